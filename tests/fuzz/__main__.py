"""The long form: `python -m tests.fuzz [openapi|messages|guided|pictures] [--count N] [--seed N]`, from the root."""

from __future__ import annotations

import argparse
import time

from tests.fuzz import messages, openapi, pictures

COUNTS = {"openapi": 500, "messages": 100_000, "guided": 100_000, "pictures": 100_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*COUNTS, []], help="by default all but the guided one")
    parser.add_argument("--count", type=int, help="inputs; for openapi calls of each operation, in each of two modes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for what in options.what or ["openapi", "messages", "pictures"]:
        begun, count = time.monotonic(), options.count or COUNTS[what]
        print(f"{what}: {count}, seed {options.seed}", flush=True)
        match what:
            case "openapi":
                counts = openapi.fuzz(count, options.seed)
                print(f"{counts.total()} calls\n{openapi.table(counts)}")
            case "messages":
                messages.main(count, options.seed)
            case "guided":
                messages.guided(count, options.seed)
            case "pictures":
                pictures.main(count, options.seed)
        print(f"{what}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
