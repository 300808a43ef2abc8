"""Text from a model: streaming replies, sampling as in transformers, conversations with a reused KV cache."""

from hybrimoe.generation.chat import Conversation, Turn, chat_options, encode_chat, has_chat_template
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.interrupt import Interrupt, interruptible
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.profile import Profile
from hybrimoe.generation.reply import FinishReason, Reply, ReplyTimes
from hybrimoe.generation.sampling import Sampler, SamplingOptions, TokenLogprob

__all__ = [
    "Conversation",
    "FinishReason",
    "Interrupt",
    "PrefixCache",
    "Profile",
    "Reply",
    "ReplyTimes",
    "Sampler",
    "SamplingOptions",
    "TextGenerator",
    "TokenLogprob",
    "Turn",
    "chat_options",
    "encode_chat",
    "has_chat_template",
    "interruptible",
]
