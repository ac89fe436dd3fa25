"""Train what a configuration describes.

accelerate launch scripts/train.py configs/vit_ripple_digits.yaml [--key=value ...]
"""

import sys

from hf_attn.errors import HfAttnError
from hf_attn.recipes.arguments import parse_overrides
from hf_attn.recipes.train import train


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    try:
        result = train(sys.argv[1], parse_overrides(sys.argv[2:]))
    except HfAttnError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if result is not None:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
