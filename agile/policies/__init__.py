"""What continues token ids: Hugging Face, vLLM here or on servers, a chat endpoint, a script."""

from agile.policies.hf import HFPolicy
from agile.policies.scripted import ScriptedPolicy

__all__ = ["HFPolicy", "ScriptedPolicy"]
