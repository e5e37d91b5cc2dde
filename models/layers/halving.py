"""边长逐次减半的网络（U-Net、SimVP）：减半之后要能恰好还原。"""

from __future__ import annotations

MOST = 20  # 报错时最多试到这么大的值


def check_halvings(
    key: str, value: int, grid: tuple[int, int], layers: int = 1, what: str = "grid", hint: str = ""
) -> None:
    """网格每 layers 层减半一次，两边都要整除。

    Args:
        key, value: model 段的键与它的值，即层数。
        what, hint: 报错里网格的叫法（潜变量也要查），与末尾再加的办法。

    Raises:
        ValueError: 有一边不能整除；列出能用的值。
    """
    times = value // layers
    for name, length in zip(("latitude", "longitude"), grid, strict=True):
        if length % 2**times:
            works = [n for n in range(1, MOST) if all(side % 2 ** (n // layers) == 0 for side in grid)]
            raise ValueError(
                f"model.{key} = {value} halves the {what} {grid[0]} x {grid[1]} {times} times, which {length} in "
                f"{name} does not allow; values that work: {works or 'none, both sides must be even'}{hint}"
            )
