"""出口的下限：与 NumPy 的奇异值分解相同；整条命令。"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.studies.head_limit import cut, left_over, main
from models.layers.ar_pred_video_vanilla_tokens import Tokenize
from tests.engine.runs import write_run


def test_it_is_the_distance_to_the_principal_plane() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    fitted, measured = rng.normal(size=(40, 6)) @ mixing + 3, rng.normal(size=(9, 6)) @ mixing + 3
    found = left_over(torch.from_numpy(fitted), torch.from_numpy(measured)).numpy()
    mean = fitted.mean(0)
    directions = np.linalg.svd(fitted - mean)[2]
    for width in range(7):
        plane = directions[:width]
        rest = (measured - mean) - (measured - mean) @ plane.T @ plane
        assert found[width] == pytest.approx(np.mean(rest**2), abs=1e-12)
    assert found[0] == pytest.approx(np.mean((measured - mean) ** 2))


def test_tokens_are_those_of_the_model() -> None:
    fields = torch.randn(3, 2, 4, 6)
    ours = Tokenize([2, 3], 2, "t h w")(fields.permute(0, 2, 3, 1))  # (3, 4, 12)
    assert torch.equal(cut(fields, (2, 3)), ours.flatten(0, 1))
    with pytest.raises(ValueError, match="does not divide the grid 4 x 6"):
        cut(fields, (3, 3))


def test_the_command(make_tree, tmp_path, capsys) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = str(write_run(tmp_path, tree))
    assert main(["--config", config, "--windows", "4", "model.decoder_width=8", "model.decoder_heads=2"]) == 0
    title, head, *rows = capsys.readouterr().out.strip().splitlines()
    assert "loss of persistence" in title and head.split()[0] == "decoder_width"
    assert [row.split()[0] for row in rows][:3] == ["2", "4", "8"]
    floors = [float(row.split()[2]) for row in rows]
    assert floors == sorted(floors, reverse=True)
    with pytest.raises(ValueError, match="--windows 9999: data.splits.train has"):
        main(["--config", config, "--windows", "9999"])
    with pytest.raises(ValueError, match="must be at least 2"):
        main(["--config", config, "--windows", "1"])
    with pytest.raises(ValueError, match="persistence has no tokens"):
        main(["--config", "config/persistence.yaml"])
