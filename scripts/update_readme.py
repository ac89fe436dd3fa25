"""Put the current capability table into README.md, between its markers.

python scripts/update_readme.py [FILE]
"""

import sys
from pathlib import Path

from hf_attn.errors import HfAttnError
from hf_attn.tables import rewrite


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 2 if len(sys.argv) > 2 else 0
    path = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1] / "README.md"
    try:
        old = path.read_text(encoding="utf-8")
        new = rewrite(old)
    except (HfAttnError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    print(f"{path}: {'the table was current' if new == old else 'the table was rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
