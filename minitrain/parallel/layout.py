"""Which layouts can work, before any rank is met: sizes of the axes against the ranks and the model."""

from minitrain.config import ParallelConfig


def objections(cfg: ParallelConfig, ranks: int, model=None) -> list[str]:
    """Every reason why this many ranks cannot run this layout, each with the rule; none if they can.

    model: the architecture's config, whose sizes are cut; None: not looked at.
    """
    pp, tp, cp, ep, within = cfg.pp, cfg.tp, cfg.cp, cfg.ep, cfg.shard_within
    reasons = []
    if cfg.pp_parts > 1 and (pp == 1 or cfg.pp_schedule != "1f1b"):
        reasons.append(f'pp_parts={cfg.pp_parts} needs several stages and pp_schedule="1f1b"')
    if cfg.pp_schedule == "zb-h1" and pp == 1:
        reasons.append('pp_schedule="zb-h1" needs several stages')
    if ranks % (pp * tp * cp):
        reasons.append(f"pp * tp * cp = {pp * tp * cp} does not divide WORLD_SIZE={ranks}")
    data = max(1, ranks // (pp * tp * cp)) * cp
    if data % ep:
        reasons.append(f"ep={ep} does not divide the {data} ranks that have other tokens (WORLD_SIZE / (pp * tp))")
    if within and data % within:
        rule = f"WORLD_SIZE={ranks}" if pp * tp == 1 else f"WORLD_SIZE / (pp * tp) = {data}"
        reasons.append(f"shard_within={within} does not divide {rule}; use a divisor of it")
    if within % ep:
        reasons.append(f"shard_within={within} is not a multiple of ep={ep}")
    if model is not None:
        reasons += _objections_of_model(pp, cfg.pp_parts, tp, ep, model)
    return [f"parallel.{reason}" for reason in reasons]


def _objections_of_model(pp, parts, tp, ep, model):
    reasons = []
    if pp * parts > model.num_hidden_layers:
        name = "pp" if parts == 1 else "pp * pp_parts"
        reasons.append(f"{name}={pp * parts} is more than num_hidden_layers={model.num_hidden_layers}")
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if tp > kv_heads and (tp % kv_heads or heads % tp):
        reasons.append(
            f"tp={tp} is more than num_key_value_heads={kv_heads}; it must then be a multiple of it and divide "
            f"num_attention_heads={heads}"
        )
    experts = getattr(model, "num_experts", 0)
    inner = "moe_intermediate_size" if experts else "intermediate_size"
    for name in ("vocab_size", inner):
        if getattr(model, name) < tp:
            reasons.append(f"tp={tp} is more than {name}={getattr(model, name)}")
    if ep > 1 and not experts:
        reasons.append(f"ep={ep}: {model.type} has no experts")
    elif ep > 1 and experts % ep:
        reasons.append(f"ep={ep} does not divide num_experts={experts}")
    return reasons
