"""Image to image as a plan: start at a picture's latents with noise added, end at clean latents.

Legend
    z        clean latents of the picture [B, C, h, w];  n  unit Gaussian noise, the same shape
    course   one run of a sampler; where it begins says how much of the picture is left
"""

from __future__ import annotations

from torch import Tensor

from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.loop import Plan


def img2img(z: Tensor, n: Tensor, course: Course) -> Plan:
    """The plan that draws a picture anew (SDEdit, 2108.01073): z at the course's first level."""
    return Plan(start=course.noisy(z, n, course.times[0]), times=course.times)
