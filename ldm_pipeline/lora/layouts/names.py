"""Module names with every dot made an underscore, as kohya's files have them, and back.

`down_blocks_0_attentions_0_proj_in` can be read in many ways, and only one is a module. Words that
have an underscore of their own are few in the networks of Stable Diffusion: they are listed, so
that a file can be read where no model is at hand. A name with other words is read as well as
possible, and is then no module of any model, which the reader of the file will say.
"""

from __future__ import annotations

WORDS = frozenset(
    """
    down_blocks up_blocks mid_block transformer_blocks
    to_q to_k to_v to_out add_k_proj add_v_proj proj_in proj_out
    conv_in conv_out conv_shortcut time_emb_proj
    time_embedding add_embedding class_embedding linear_1 linear_2 cond_proj
    text_model self_attn q_proj k_proj v_proj out_proj text_projection
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection
    time_embed label_emb
    """.split()  # noqa: SIM905  # a list of quoted words would be four times as long
)
"""What has an underscore of its own: diffusers' UNets, CLIP, and the sgm names of SDXL."""

LONGEST = max(word.count("_") for word in WORDS) + 1


def flat(name: str) -> str:
    """A dotted name with underscores for dots."""
    return name.replace(".", "_")


def dotted(flattened: str) -> str:
    """The dotted name that `flat` made `flattened` of, the longest words first."""
    pieces = flattened.split("_")
    words = []
    while pieces:
        for count in range(min(LONGEST, len(pieces)), 0, -1):
            word = "_".join(pieces[:count])
            if count == 1 or word in WORDS:
                words.append(word)
                del pieces[:count]
                break
    return ".".join(words)
