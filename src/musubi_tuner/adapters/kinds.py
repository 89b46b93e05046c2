"""Adapters that are no LoRA, told by their keys and refused by name.

What they change cannot be kept by a LoRA. Their other keys may look like one; taken alone they would be another adapter, so
nothing of such a file is used.
"""

import re
from collections.abc import Iterable

from musubi_tuner.errors import CheckpointError

KINDS = {
    r"dora_scale|lora_magnitude_vector|magnitude": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+": "OFT",
    r"boft_\w+": "BOFT",
    r"ia3_l|on_input": "(IA)^3",
    r"[ab][12]\.weight": "GLoRA",
    r"lora_mid": "LoCon with Tucker",
    r"lora_E|ranknum": "AdaLoRA",
    r"vera_lambda_\w+": "VeRA",
    r"hra_u|vblora_\w+|fourierft_\w+|randlora_\w+|shira_\w+|c3a_\w+|bone_\w+|miss_\w+": "another method of peft",
    r"lora_(?:B|up)(?:\.[^.]+)?\.bias": "a LoRA with biases (lora_bias)",
    r"lora_embedding_[AB]": "a LoRA of an embedding",
    r"scalar": "a LoRA with a trained factor (use_scalar)",
    r"diff(?:_b)?|[wb]_norm|set_weight|reshape_weight": "a change of whole weights, norms or biases (diff)",
}
"""Ends of keys, or parts of them between dots, by the name of what they belong to."""
_KINDS = [(re.compile(rf"(?:.*\.)?(?:{leaf})(?:\..*)?"), name) for leaf, name in KINDS.items()]
_LORA = re.compile(r".*\.lora(?:_[AB]|_down|_up|\.down|\.up)\b.*")
_WHOLE = re.compile(r"(?!.*\.lora[_.]).*\.(?:weight|bias)")


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Refuse the keys of a file in which something else than a LoRA stands, or a LoRA with more.

    Raises:
        CheckpointError: naming a key and what it is.
    """
    keys = list(keys)
    for kind, name in _KINDS:
        key = next((key for key in keys if kind.fullmatch(key)), None)
        if key is not None:
            raise CheckpointError(f"{key}: this is {name}, which is not supported yet; only LoRA is")
    whole = next((key for key in keys if _WHOLE.fullmatch(key)), None)
    if whole is not None and any(_LORA.fullmatch(key) for key in keys):
        raise CheckpointError(
            f"{whole}: this is a whole weight beside a LoRA (modules_to_save or bias of peft), which is not supported yet; only "
            "LoRA is"
        )
