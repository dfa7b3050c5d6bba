"""Which requests a router can serve at all: checked before they are queued, so that the one who asked hears of it at once."""

from __future__ import annotations

from ..configs.errors import ContextTooLongError, RequestError
from .messages import GenerateRequest


def check_request(request: GenerateRequest, *, vocab_size: int, max_context: int) -> None:
    """Refuse what no router of these limits can serve.

    Raises:
        RequestError: tokens are missing or not in the vocabulary, or the sampling cannot be.
        ContextTooLongError: the prompt and `max_tokens` together do not fit.
    """
    prompt, wanted, generated = len(request.prompt_token_ids), request.sampling.max_tokens, request.generated_token_ids
    if not prompt:
        raise RequestError("the prompt has no tokens", param="prompt")
    for param, tokens in (("prompt", request.prompt_token_ids), ("generated_token_ids", generated)):
        bad = next((t for t in tokens if not isinstance(t, int) or not 0 <= t < vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad!r} is not one of the vocabulary of {vocab_size}", param=param)
    request.sampling.check()
    if len(generated) >= wanted or not set(request.sampling.stop_token_ids).isdisjoint(generated):
        raise RequestError(
            f"the {len(generated)} tokens of the answer so far reach max_tokens = {wanted} or hold a stop token: "
            "there is nothing to go on with",
            param="generated_token_ids",
        )
    if prompt + wanted > max_context:
        raise ContextTooLongError(
            f"{prompt} prompt tokens and max_tokens = {wanted} need {prompt + wanted}, "
            f"the context is {max_context} tokens",
            param="max_tokens",
        )
