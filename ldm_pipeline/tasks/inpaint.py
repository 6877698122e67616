"""Inpainting as a plan: any plan, with what is known put back after every step.

Legend
    z        clean latents of the known picture [B, C, h, w];  n  unit Gaussian noise of that shape
    mask     [B, 1, h, w]: 1 where is to be painted, 0 where the picture is known
    s        the level that a step ends on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ldm_pipeline.diffusion.course import Course
from ldm_pipeline.diffusion.loop import Constrain, Plan


def inpaint(
    plan: Plan, z: Tensor, mask: Tensor | Callable[[], Tensor], n: Tensor, course: Course
) -> Plan:
    """`plan`, painting only where `mask` is 1. It begins where `plan` does: at noise or at z."""
    return replace(plan, constrain=keep_known(z, mask, n, course))


def keep_known(
    z: Tensor, mask: Tensor | Callable[[], Tensor], n: Tensor, course: Course
) -> Constrain:
    """Puts z at level s back where `mask` is 0 (RePaint, 2201.09865, eq. 8), with the same noise n
    at every level; at CLEAN that is z itself. `mask` may be a callable, read at every step."""
    read = mask if callable(mask) else lambda: mask

    def constrain(x: Tensor, s: float) -> Tensor:
        painted = read()
        return (1 - painted) * course.noisy(z, n, s) + painted * x

    return constrain
