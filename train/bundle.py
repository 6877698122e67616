"""Put a trained model into the package, or any folder, with its model card.

    python train/bundle.py MODEL TEXT OUT [--report JSON] [--lcm DIR [--lcm-report JSON]]
                                          [--decoder DIR] [--history MD]
                                          [--licence NAME]

MODEL is a final folder of train_unet.py, TEXT one of train_clip.py, the others those of
train_lcm.py and train_small_decoder.py; `ldm evaluate --out` writes report.json.
The history tells of the training, for the card, which names the licence.
"""

import argparse
import sys
from pathlib import Path

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.bundle import Parts, bundle


def main() -> None:
    """Bundle, and say where."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "text", "out"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    for name in ("report", "lcm", "lcm-report", "decoder", "history"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--licence")
    told = vars(parser.parse_args())
    out = told.pop("out")
    try:
        print(bundle(Parts(**told), out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
