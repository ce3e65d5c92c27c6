"""Names of the attention backends, for the settings and for :mod:`vtprune_train.models.forward.attention`."""

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
BACKENDS = (*FLASH, "varlen_torch", "varlen_sdpa")  # in the order in which ``auto`` tries them
