"""What continues token ids: a Hugging Face model, or a script."""

from agile.policies.hf import HFPolicy
from agile.policies.scripted import ScriptedPolicy

__all__ = ["HFPolicy", "ScriptedPolicy"]
