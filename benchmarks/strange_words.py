"""How much of the words is still drawn where a prompt holds some that the model never saw. By hand:

    python -m benchmarks.strange_words --prompts 200

People type "a beautiful picture: a red star above a blue house, detailed". The same held-out
captions of the picture world are drawn as they are and in such a frame, from the same seeds, and
the judge reads both. No caption of any training had these frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.lora_concept import drawn
from ldm_pipeline import load
from ldm_pipeline.data.world import World
from ldm_pipeline.evaluation.report import judged

FRAMES = (
    "{} in high quality",
    "a beautiful picture: {}",
    "{}, detailed, trending",
    "cute {}",
    "wonderful {} by a famous painter",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled", help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the world (%(default)s)")
    args = parser.parse_args(argv)
    pipe = load(args.model)
    samples = [World(args.seed, "test")[i] for i in range(args.prompts)]
    captions = [sample.caption for sample in samples]
    framed = [FRAMES[i % len(FRAMES)].format(text) for i, text in enumerate(captions)]
    for name, prompts in (("as they are", captions), ("among strange words", framed)):
        pictures = drawn(pipe, prompts)
        right = [judged(s, p).verdict.all for s, p in zip(samples, pictures, strict=True)]
        print(f"{name}: everything right in {np.mean(right):.3f} of {len(right)}", flush=True)


if __name__ == "__main__":
    main()
