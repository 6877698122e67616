"""The mathematics of diffusion, on torch alone: one schedule, one denoiser, one loop.

schedule    how much signal and noise there is at a level
prediction  what a network's answer means
denoiser    denoiser(x, t) -> Prediction(x0, eps), and guidance
noise       randomness, one generator per image
grids       which levels a sampler visits
course      what a sampler offers for one run
samplers    DDIM, DDPM, Euler, ancestral Euler and LCM as one equation; the table of names
solvers     Heun and DPM-Solver++(2M)
loop        the one sampling loop
losses      the training loss
consistency the distillation of few-step students
"""

from ldm_pipeline.diffusion.consistency import (
    SOLVERS,
    ConsistencyFunction,
    consistency_errors,
    consistency_function,
    descend,
    descents,
    guided_each,
)
from ldm_pipeline.diffusion.course import Course, GridSampler, NativeSampler, Sampler
from ldm_pipeline.diffusion.denoiser import Denoiser, Guidance, Network, guided, make_denoiser
from ldm_pipeline.diffusion.gaussian import Gaussian
from ldm_pipeline.diffusion.loop import Plan, Step, Stop, run
from ldm_pipeline.diffusion.losses import (
    WEIGHTINGS,
    Loss,
    denoising_errors,
    denoising_loss,
    loss_weights,
)
from ldm_pipeline.diffusion.noise import Noise, coarse_noise
from ldm_pipeline.diffusion.prediction import (
    PREDICTION_TYPES,
    Prediction,
    boundary_scalings,
    interpret,
    target,
)
from ldm_pipeline.diffusion.samplers import NATIVE_SAMPLERS, SAMPLERS, Consistency, Renoise
from ldm_pipeline.diffusion.schedule import CLEAN, Schedule
from ldm_pipeline.diffusion.solvers import DPMSolverPP2M, Heun

__all__ = [
    "CLEAN",
    "NATIVE_SAMPLERS",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "SOLVERS",
    "WEIGHTINGS",
    "Consistency",
    "ConsistencyFunction",
    "Course",
    "DPMSolverPP2M",
    "Denoiser",
    "Gaussian",
    "GridSampler",
    "Guidance",
    "Heun",
    "Loss",
    "NativeSampler",
    "Network",
    "Noise",
    "Plan",
    "Prediction",
    "Renoise",
    "Sampler",
    "Schedule",
    "Step",
    "Stop",
    "boundary_scalings",
    "coarse_noise",
    "consistency_errors",
    "consistency_function",
    "denoising_errors",
    "denoising_loss",
    "descend",
    "descents",
    "guided",
    "guided_each",
    "interpret",
    "loss_weights",
    "make_denoiser",
    "run",
    "target",
]
