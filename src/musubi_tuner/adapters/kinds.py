"""Adapters that cannot be read, told by their keys and refused by name.

Their other keys may look like a type that can; taken alone they would be another adapter, so nothing of such a file is used.
"""

import re
from collections.abc import Iterable

from musubi_tuner.errors import CheckpointError

KINDS = {
    r"magnitude": "DoRA of an unknown program",
    r"b?oft_[RrSs]": "OFT of peft",
    r"ia3_l": "(IA)^3 of peft",
    r"lora_mid|hada_t[12]|lokr_t2|bm": "an adapter with Tucker decomposition",
    r"lora_E|ranknum": "AdaLoRA",
    r"vera_lambda_\w+": "VeRA",
    r"hra_u|vblora_\w+|fourierft_\w+|randlora_\w+|shira_\w+|c3a_\w+|bone_\w+|miss_\w+": "another method of peft",
    r"lora_(?:B|up)(?:\.[^.]+)?\.bias": "a LoRA with biases (lora_bias)",
    r"lora_embedding_[AB]": "a LoRA of an embedding",
    r"scalar": "a LoRA with a trained factor (use_scalar)",
    r"diff_b|b_norm": "a change of biases",
    r"set_weight|reshape_weight": "a change of whole weights",
}
"""Ends of keys, or parts of them between dots, by the name of what they belong to."""
_KINDS = [(re.compile(rf"(?:.*\.)?(?:{leaf})(?:\..*)?"), name) for leaf, name in KINDS.items()]
_LORA = re.compile(r".*\.lora(?:_[AB]|_down|_up|\.down|\.up)\b.*")
_WHOLE = re.compile(r"(?!lora_|lycoris_|.*\.lora[_.]|.*\.[ab][12]\.).*\.(?:weight|bias)")


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Refuse the keys of a file in which a change stands that cannot be read.

    Raises:
        CheckpointError: naming a key and what it is.
    """
    keys = list(keys)
    for kind, name in _KINDS:
        key = next((key for key in keys if kind.fullmatch(key)), None)
        if key is not None:
            raise CheckpointError(f"{key}: this is {name}, which is not supported")
    whole = next((key for key in keys if _WHOLE.fullmatch(key)), None)
    if whole is not None and any(_LORA.fullmatch(key) for key in keys):
        raise CheckpointError(
            f"{whole}: this is a whole weight beside a LoRA (modules_to_save or bias of peft), which is not supported"
        )
