"""Methods of alignment at test time, and fine-tuning beside them, behind one interface: what `recontrol.evaluate` compares."""

from recontrol.methods.adapters import FineTuned
from recontrol.methods.base import Method, Together, Training, Uncontrolled
from recontrol.methods.best_of_n import BestOfN
from recontrol.methods.control import ReControl
from recontrol.methods.fine_tuning import FineTuning, make_preference_pairs, train_dpo, train_rl
from recontrol.methods.prompting import Prompting, best_examples
from recontrol.methods.reranking import ARGS, PrefixScorer
from recontrol.methods.static_editing import Direction, StaticEditing, mean_difference, reward_direction

__all__ = ["ARGS", "BestOfN", "Direction", "FineTuned", "FineTuning", "Method", "PrefixScorer", "Prompting", "ReControl", "StaticEditing", "Together"]
__all__ += ["Training", "Uncontrolled", "best_examples", "make_preference_pairs", "mean_difference", "reward_direction", "train_dpo", "train_rl"]
