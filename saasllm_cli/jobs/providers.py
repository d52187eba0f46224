"""The providers whose models take a key by the call, and then no other, by litellm's names.

A call with an own key says where to, as well: what litellm finds in the environment (OPENAI_BASE_URL and its like) is
for the environment's keys. The addresses are those to which litellm sends where the environment names none.
"""

from difflib import get_close_matches

PROXY = "litellm_proxy"  # its address is SAASLLM_PROXY_URL, unless an own key has another

# None where the address is the customer's.
ADDRESSES: dict[str, str | None] = {
    "ai21": "https://api.ai21.com/studio/v1",
    "aiml": "https://api.aimlapi.com/v1",
    "amazon_nova": "https://api.nova.amazon.com/v1",
    "anthropic": "https://api.anthropic.com",
    "apertis": "https://api.stima.tech/v1",
    "assemblyai": "https://llm-gateway.assemblyai.com/v1",
    "azure": None,
    "azure_ai": None,
    "baseten": "https://inference.baseten.co/v1",
    "cerebras": "https://api.cerebras.ai/v1",
    "charity_engine": "https://api.charityengine.services/remotejobs/v2/inference",
    "chutes": "https://llm.chutes.ai/v1",
    "cloudflare": None,
    "codestral": "https://codestral.mistral.ai/v1",
    "cognition": "https://api.cognition.ai/v1",
    "cohere": "https://api.cohere.com/v2/chat",
    "cometapi": "https://api.cometapi.com",
    "compactifai": "https://api.compactif.ai/v1",
    "cortecs": "https://api.cortecs.ai/v1",
    "darkbloom": "https://api.darkbloom.dev/v1",
    "dashscope": "https://dashscope.aliyuncs.com/compatible-mode/v1",
    "deepinfra": "https://api.deepinfra.com/v1/openai",
    "deepseek": "https://api.deepseek.com/beta",
    "docker_model_runner": None,
    "edenai": "https://api.edenai.run/v3",
    "empower": "https://app.empower.dev/api/v1",
    "featherless_ai": "https://api.featherless.ai/v1",
    "fireworks_ai": "https://api.fireworks.ai/inference/v1",
    "friendliai": "https://api.friendli.ai/serverless/v1",
    "galadriel": "https://api.galadriel.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "github": "https://models.inference.ai.azure.com",
    "groq": "https://api.groq.com/openai/v1",
    "helicone": "https://ai-gateway.helicone.ai",
    "heroku": None,
    "hosted_vllm": None,
    "hyperbolic": "https://api.hyperbolic.xyz/v1",
    "inception": "https://api.inceptionlabs.ai/v1",
    "lambda_ai": "https://api.lambda.ai/v1",
    "libertai": "https://api.libertai.io/v1",
    PROXY: None,
    "llamafile": None,
    "lm_studio": None,
    "meta": "https://api.meta.ai/v1",
    "meta_llama": "https://api.llama.com/compat/v1",
    "minimax": "https://api.minimax.io",
    "mistral": "https://api.mistral.ai",
    "modelscope": "https://api-inference.modelscope.cn/v1",
    "moonshot": "https://api.moonshot.ai/v1",
    "morph": "https://api.morphllm.com/v1",
    "nadir": "https://api.getnadir.com/v1",
    "nano-gpt": "https://nano-gpt.com/api/v1",
    "nebius": "https://api.studio.nebius.ai/v1",
    "neosantara": "https://api.neosantara.xyz/v1",
    "novita": "https://api.novita.ai/v3/openai",
    "nscale": "https://inference.api.nscale.com/v1",
    "nvidia_nim": "https://integrate.api.nvidia.com/v1",
    "openai": "https://api.openai.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "ovhcloud": "https://oai.endpoints.kepler.ai.cloud.ovh.net/v1",
    "parasail": "https://api.parasail.io/v1",
    "perplexity": "https://api.perplexity.ai",
    "pinstripes": "https://pinstripes.io/v1",
    "poe": "https://api.poe.com/v1",
    "prism": "https://api.prisminference.com/v1",
    "publicai": "https://api.publicai.co/v1",
    "qwen_ai_platform": "https://dashscope.aliyuncs.com/compatible-mode/v1",
    "qwencloud": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
    "ragflow": None,
    "reka": "https://api.reka.ai/v1",
    "sail": "https://api.sailresearch.com/v1",
    "sambanova": "https://api.sambanova.ai/v1",
    "scaleway": "https://api.scaleway.ai/v1",
    "scx-ai": "https://api.scx.ai/v1",
    "snowflake": None,
    "synthetic": "https://api.synthetic.new/openai/v1",
    "tencent": "https://tokenhub-intl.tencentcloudmaas.com/v1",
    "tensormesh": "https://serverless.tensormesh.ai/v1",
    "together_ai": "https://api.together.ai/v1",
    "v0": "https://api.v0.dev/v1",
    "vercel_ai_gateway": "https://ai-gateway.vercel.sh/v1",
    "volcengine": "https://ark.cn-beijing.volces.com/api/v3",
    "wandb": "https://api.inference.wandb.ai/v1",
    "xai": "https://api.x.ai/v1",
    "xiaomi_mimo": "https://api.xiaomimimo.com/v1",
    "xinference": None,
    "zai": "https://api.z.ai/api/paas/v4",
}

# What litellm calls the same provider elsewhere: one key is for both.
ALIASES = {
    "ai21_chat": "ai21",
    "anthropic_text": "anthropic",
    "azure_text": "azure",
    "cohere_chat": "cohere",
    "text-completion-openai": "openai",
}


def known_provider(name: str) -> str:
    """`ValueError` where it is none that takes a key with each call."""
    if name in ALIASES:
        raise ValueError(f"{name!r} has the keys of {ALIASES[name]}: use that")
    if name not in ADDRESSES:
        near = get_close_matches(name, ADDRESSES, 1, 0.75)
        meant = f"did you mean {near[0]}?" if near else "use litellm's name, such as openai, anthropic or gemini"
        raise ValueError(f"{name!r} is not a provider that takes a key with each call: {meant}")
    return name


def has_address(provider: str) -> bool:
    """Whether models of it can be called without an address of the customer's."""
    return provider == PROXY or ADDRESSES[provider] is not None
