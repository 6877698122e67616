"""Text to image as a plan: start at pure noise, end at clean latents.

Legend
    n        unit Gaussian noise [B, C, h, w]
    course   one run of a sampler: its levels, its step, and the scale in which it keeps x
"""

from __future__ import annotations

from torch import Tensor

from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.loop import Plan


def generate(n: Tensor, course: Course) -> Plan:
    """The plan that draws new pictures: `n`, scaled as the sampler wants it, down to CLEAN."""
    return Plan(start=course.first(n), times=course.times)
