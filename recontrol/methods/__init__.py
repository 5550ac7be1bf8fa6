"""Methods of alignment at test time, and fine-tuning beside them, behind one interface: what `recontrol.evaluate` compares."""

from recontrol.methods.base import Method, Together, Training, Uncontrolled
from recontrol.methods.control import ReControl

__all__ = ["Method", "ReControl", "Together", "Training", "Uncontrolled"]
