"""The long form: `python -m tests.fuzz openapi messages pictures guided [--count N] [--seed N]`, from the root."""

from __future__ import annotations

import argparse
import time

GUIDED = ("gateway.intake", "gateway.plan", "gateway.pipeline", "tests.fuzz.messages")
COUNTS = {"openapi": 500, "messages": 100_000, "guided": 100_000, "pictures": 100_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=COUNTS, help="guided: messages by atheris, and nothing behind it")
    parser.add_argument("--count", type=int, help="inputs; for openapi calls of each operation, in each of two modes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for what in options.what:
        begun, count = time.monotonic(), options.count or COUNTS[what]
        print(f"{what}: {count}, seed {options.seed}", flush=True)
        match what:
            case "openapi":
                from tests.fuzz import openapi

                counts = openapi.fuzz(count, options.seed)
                print(f"{counts.total()} calls\n{openapi.table(counts)}")
            case "messages":
                from tests.fuzz import messages

                messages.main(count, options.seed)
            case "guided":
                import atheris

                with atheris.instrument_imports(include=["vidgen.contracts", *GUIDED]):
                    from tests.fuzz import messages
                messages.guided(count, options.seed)
            case "pictures":
                from tests.fuzz import pictures

                pictures.main(count, options.seed)
        print(f"{what}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
