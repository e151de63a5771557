"""Length, batch, experts and computation."""

from __future__ import annotations

from flows.from_swift import table
from flows.from_swift.draft import Draft
from flows.from_swift.table import Argument
from mcore.bridge.families import family_of_config
from mcore.errors import InputError, Problem

BIAS_UPDATE_RATE = 1.0e-3
"""What `moe_router_bias_update_rate` is there, by the manual of release 3.9."""


def num_train_epochs(draft: Draft, row: Argument) -> None:
    """One of epochs and steps; there both may be given."""
    if row.name in draft.given and "train_iters" in draft.given:
        draft.note(row, "left out", "train_iters is given too; there whichever ends first counts")
    elif row.name in draft.given:
        draft.put(row, draft.given[row.name], "changed", row.note, comment=row.note)
    elif "train_iters" not in draft.given:
        draft.problems.append(Problem("--train_iters or --num_train_epochs", "one of them", "none", "Add it."))


def packing(draft: Draft, row: Argument) -> None:
    """There a step has `global_batch_size` packs and here as many samples, however they are laid into rows."""
    assert row.target is not None
    if draft.get("packing"):
        comment = (
            "There a step is this many packs of packing_length tokens, here this many samples, packed: multiply it by "
            "the samples of a pack (packing_length by the mean length of a sample)."
        )
        draft.put(row, True, "changed", "samples of a step share rows; a step is counted in samples")
        draft.put(
            table.by_name()["global_batch_size"], draft.get("global_batch_size"), "to do", comment, comment=comment
        )
    elif not draft.get("padding_free") or _balances_samples(draft):
        draft.put(row, False, "carried" if row.name in draft.given else "default", "samples are padded")
    elif row.name in draft.given:
        draft.note(row, "changed", "samples of a step share rows without padding, as with padding_free there")


def lr_decay_iters(draft: Draft, row: Argument) -> None:
    """A rate that is constant decays in no number of steps; ours refuses one."""
    if row.name in draft.given and draft.get("lr_decay_style") == "constant":
        draft.note(row, "left out", "has no effect with --lr_decay_style constant", effect="nothing")
    elif row.name in draft.given:
        draft.put(row, draft.given[row.name], "carried")


def global_batch_size(draft: Draft, row: Argument) -> None:
    """Samples in both, but for packs; then `packing` says what is to be done."""
    if row.name in draft.given and not draft.get("packing"):
        draft.put(row, draft.given[row.name], "carried")


def padding_free(draft: Draft, row: Argument) -> None:
    """The other half of `packing`."""
    if row.name in draft.given and draft.get("packing"):
        draft.note(row, "left out", "packing implies it", effect="nothing")
    elif row.name in draft.given:
        draft.note(row, "changed", row.note)


def _balances_samples(draft: Draft) -> bool:
    return bool(draft.get("moe_aux_loss_coeff")) and draft.get("moe_router_load_balancing_type") == "seq_aux_loss"


def balancing_type(draft: Draft, row: Argument) -> None:
    """Nothing is balanced while the loss has no weight, whatever its type."""
    coefficient = draft.get("moe_aux_loss_coeff")
    if not coefficient:
        if row.name in draft.given:
            draft.note(row, "left out", "nothing is balanced: moe_aux_loss_coeff is 0", effect="nothing")
    elif row.name in draft.given:
        draft.put(row, draft.given[row.name], "carried")
    else:
        comment = "Megatron-SWIFT takes the type in the model's config.json."
        draft.put(row, "aux_loss", "to do", comment, comment=comment)


def bias_update_rate(draft: Draft, row: Argument) -> None:
    """Written out for models whose routers have such a bias, if that can be told."""
    if row.name in draft.given:
        draft.put(row, draft.given[row.name], "carried")
        return
    if draft.hf_config is None or draft.tuner_type != "full":
        return
    try:
        arguments = family_of_config(draft.hf_config).transformer_config(draft.hf_config)
    except InputError:
        return  # told by `mcore-flows plan`
    if arguments.get("moe_router_enable_expert_bias"):
        draft.put(row, BIAS_UPDATE_RATE, "default", row.note)


def gradient_accumulation_fusion(draft: Draft, row: Argument) -> None:
    """On there means on where it can be had, which is what ours does if nothing is said."""
    if row.name not in draft.given:
        return
    is_off = bool(draft.get(row.name)) == row.name.startswith("no_")
    if is_off:
        draft.put(row, False, "carried")
    else:
        draft.note(row, "carried", row.note)


def cross_entropy_loss_fusion(draft: Draft, row: Argument) -> None:
    """Of no field: how many logits are held at once is ours."""
    if row.name in draft.given:
        draft.note(row, "changed", row.note)
