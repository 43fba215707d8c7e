"""What a pretraining run takes, worked out before it is started."""

from .communication import Exchange, Links
from .flops import FLOP_PER_MAC, published_macs
from .gpus import GPUS, Gpu, Rates, find_gpu
from .measured import default_results, measured_efficiency, measured_rates
from .planner import Efficiency, Plan, StepTime, make_plan, parameters_of
from .settings import Settings
from .trace import Call, StepTrace, trace_step

__all__ = [
    "FLOP_PER_MAC",
    "GPUS",
    "Call",
    "Efficiency",
    "Exchange",
    "Gpu",
    "Links",
    "Plan",
    "Rates",
    "Settings",
    "StepTime",
    "StepTrace",
    "default_results",
    "find_gpu",
    "make_plan",
    "measured_efficiency",
    "measured_rates",
    "parameters_of",
    "published_macs",
    "trace_step",
]
