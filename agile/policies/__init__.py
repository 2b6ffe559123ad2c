"""What continues token ids: Hugging Face, vLLM, vLLM servers, a chat endpoint, a script. Imported here: what is light."""

from agile.policies.hf import HFPolicy
from agile.policies.scripted import ScriptedPolicy

__all__ = ["HFPolicy", "ScriptedPolicy"]
