"""docs/config.md 由 schema、config/README.md 由各 YAML 印出：`python -m engine.reference.write [--texts]`。"""

from __future__ import annotations

from util.cli import Parser, run_command


def main() -> int:
    parser = Parser(
        prog="python -m engine.reference.write",
        description="Write docs/config.md and config/README.md anew.",
    )
    parser.add_argument(
        "--texts", action="store_true", help="keep the costs that config/README.md holds: seconds, not minutes"
    )
    texts = parser.parse_args().texts
    from engine.reference import configs, keys  # --help 不必等 torch

    keys.PAGE.write_text(keys.page([*keys.config_keys(), *keys.model_keys()]), encoding="utf-8")
    known = configs.written_costs(configs.PAGE.read_text(encoding="utf-8")) if texts else configs.costs()
    configs.PAGE.write_text(configs.page(known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
