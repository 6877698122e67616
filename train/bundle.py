"""Put a trained model into the package, or any folder, with its model card.

    python train/bundle.py MODEL TEXT OUT [REPORT]

MODEL is a final folder of train_unet.py, TEXT one of train_clip.py, REPORT what
`ldm evaluate --out` wrote as report.json.
"""

import sys
from pathlib import Path

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.bundle import bundle

if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    model, text, out, *report = (Path(argument) for argument in sys.argv[1:])
    try:
        print(bundle(model, text, report[0] if report else None, out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
