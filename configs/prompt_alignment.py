"""DDPO: a vision-language model sees in the picture what the prompt says.

    python -m ddrl_jax.main --config=configs/prompt_alignment.py \
        --workdir=runs/alignment --config.rewards.vlm.model=NAME \
        --config.rewards.vlm.base_url=http://HOST:8000/v1

It needs BERTScore (`make EXTRAS=test,alignment setup`) or
--config.rewards.vlm.scorer=words; ":strict" needs neither. Not run at full size yet.

arXiv 2305.13301, section 5.2: any OpenAI-compatible endpoint says what is going on in
the picture, BERTScore recall of "The image contains PROMPT" is the reward. 135 prompts,
animals at activities. A picture that has no answer in the end leaves the epoch and is
counted. ":strict" asks three questions of each prompt instead ("Who is washing the
dishes?"): the reward is the share of answers that have the expected word. ":smoke"
needs no server: the tiny shipped CLIP judges in its place. The other variants and what
they set: configs/ddpo_sd.py.
"""

from ml_collections import ConfigDict

from configs import ddpo_sd


def get_config(variant: str = "") -> ConfigDict:
    c = ddpo_sd.task("prompt_alignment", variant, updates=2, own=("strict",))
    c.rewards.weights = ConfigDict({"vlm_alignment": 1.0})
    if variant.startswith("strict"):
        c.rewards.weights = ConfigDict({"vlm_questions": 1.0})
        c.rewards.vlm.questions = "nouns_activities"
    c.prompts.update(source="set", set="nouns_activities")
    c.rewards.update(on_failure="mask", timeout=600.0)
    c.advantages.tracker_size = 32
    if not variant.startswith(("rwr", "sparse_rwr", "paper", "sf")):
        c.train.epochs = 200
    if variant.endswith("smoke"):
        c.rewards.weights = ConfigDict({"clip_score": 1.0})
    return ddpo_sd.finish(c, variant)
