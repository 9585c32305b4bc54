"""Attribution equals its definition: sums that come out, finite differences, and the model's own logits."""

import numpy as np
import pytest
import torch
from conftest import fresh, ids_of, near, plain_of, tiny

import heads
from heads.lab.attribution import attribution_patching, direct_attribution, logit_lens
from heads.metrics import KNOWN, contrast, evaluate
from heads.tasks.base import Task

LINEAR = ["logit difference", "answer logit", contrast([7, 9, 20])]


def task_of(model, prompts: int = 5, length: int = 10, foils: int = 2, twins: str = "other") -> Task:
    """Random prompts; twins are other prompts, or the same but for one token ("near")."""
    ids, corrupted = ids_of(model, length, prompts), ids_of(model, length, prompts, seed=1)
    if twins == "near":
        corrupted = torch.where(torch.arange(length) == 4, corrupted, ids)
        corrupted[:, 4] = torch.where(corrupted[:, 4] == ids[:, 4], corrupted[:, 4] + 1, corrupted[:, 4])
    drawn = [torch.randperm(200, generator=torch.Generator().manual_seed(i)) for i in range(prompts)]
    tokens = torch.stack(drawn)[:, : foils + 1] + 5
    roles = {"subject": torch.arange(prompts) % 3 + 2}
    return Task("random", ids, tokens[:, 0], tokens[:, 1:], corrupted, roles)


def value(logits, task, metric="logit difference"):
    read = KNOWN.get(metric, metric)
    columns = read.columns(task)
    return read(logits if columns is None else logits.gather(-1, columns), task)


def slope_of_the_cap(plain, raw) -> torch.Tensor:
    """How fast capped logits follow raw ones, by a small step."""
    raw = raw.double()
    return ((plain.capped(raw + 1e-4) - plain.capped(raw - 1e-4)) / 2e-4).float()


# -------------------------------------------------------------------------- direct attribution


@pytest.mark.parametrize("metric", LINEAR, ids=["difference", "answer", "contrast"])
def test_everything_that_is_written_sums_to_the_metric(decoder, metric):
    """Of the logits before a cap, times the cap's slope in the run: without a cap, of the model's own logits."""
    task, plain, seen = task_of(decoder), plain_of(decoder), {}
    handle = plain.unembed.register_forward_hook(lambda _, args, out: seen.update(raw=out[:, -1].clone()))
    plain(task.ids)
    handle.remove()
    found = direct_attribution(decoder, task, metric, batch=2)
    assert found.samples.shape == (5, 4, 4) and found.mlp_samples.shape == (5, 4)
    total = found.samples.sum((1, 2)) + found.mlp_samples.sum(1) + found.embedding + found.biases
    near(torch.tensor(total).float(), value(seen["raw"] * slope_of_the_cap(plain, seen["raw"]), task, metric), scale=5)
    if decoder.anatomy.family != "gemma2":
        near(torch.tensor(total), torch.tensor(found.base), scale=5)
    near(torch.tensor(found.base).float(), evaluate(decoder, task, metric))


def test_a_heads_part_is_what_its_write_changes_with_the_norms_frozen(decoder):
    """By hand: the head's share of the final stream, the norms' scales (and a cap's slope) kept as they are in the run."""
    task, plain = task_of(decoder), plain_of(decoder)
    found, streams, sums, final = direct_attribution(decoder, task), {}, [], plain.norm
    handles = [final.register_forward_pre_hook(lambda _, args: streams.update(last=args[0][:, -1]))]
    handles += [p.register_forward_hook(lambda _, args, out: sums.append(out[:, -1])) for p in plain.projections]
    z = plain.z(task.ids)
    [handle.remove() for handle in handles]
    scale = lambda x, centred: (x - centred * x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True).sqrt()  # noqa: E731
    centred = plain.family in ("gpt2", "gpt-neox")
    slope = slope_of_the_cap(plain, plain.unembed(final(streams["last"])))
    for layer, head in [(0, 1), (2, 3), (3, 0)]:
        written = z[layer][:, -1, head] @ plain.slices(layer)[head]
        if plain.post_normed:
            written = written * (1 + plain.blocks[layer].post_attention_layernorm.weight) / scale(sums[layer], False)
        weight = final.weight + plain.family.startswith("gemma")
        written = weight * (written - centred * written.mean(-1, keepdim=True)) / scale(streams["last"], centred)
        by_hand = value(written @ plain.unembed.weight.T * slope, task)
        near(torch.tensor(found.samples[:, layer, head]).float(), by_hand, scale=10)


def test_a_mean_reference_leaves_what_differs_between_prompts(decoder):
    task, same = task_of(decoder), task_of(decoder)
    same = Task("same", task.ids[:1].expand(5, -1), task.answers, task.foils, task.corrupted)
    assert abs(direct_attribution(decoder, same, reference="mean").samples).max() < 1e-4
    plain, centred = direct_attribution(decoder, task), direct_attribution(decoder, task, reference="mean", batch=2)
    one = Task("one answer", task.ids, task.answers[:1].expand(5), task.foils[:1].expand(5, -1), task.corrupted)
    assert abs(plain.samples - centred.samples).max() > 1e-2
    # with one direction for all, what is left sums to nothing once the scale is taken out
    left = direct_attribution(decoder, one, "answer logit", reference="mean")
    assert left.samples.shape == (5, 4, 4) and (left.base == direct_attribution(decoder, one, "answer logit").base).all()


def test_a_mean_reference_by_hand(llama):
    task, plain = task_of(llama), plain_of(llama)
    z = torch.stack([x[:, -1] for x in plain.z(task.ids)], 1)  # [prompt, layer, head, d_head]
    last, weight = {}, plain.module.model.norm.weight
    handle = plain.module.model.norm.register_forward_pre_hook(lambda _, args: last.update(x=args[0][:, -1]))
    plain(task.ids)
    handle.remove()
    rows, expected = plain.module.lm_head.weight, torch.zeros(5, 4, 4)
    for p in range(5):
        u = weight * (rows[task.answers[p]] - rows[task.foils[p]].mean(0)) / last["x"][p].pow(2).mean().sqrt()
        for layer in range(4):
            for head in range(4):
                written = (z[p, layer, head] - z[:, layer, head].mean(0)) @ plain.slices(layer)[head]
                expected[p, layer, head] = written @ u
    near(torch.tensor(direct_attribution(llama, task, reference="mean", batch=2).samples).float(), expected)


def test_a_metric_that_is_not_linear_is_linearised(llama):
    """One head's write, scaled a little: the metric moves as its part says."""
    task = task_of(llama)
    found, plain = direct_attribution(llama, task, "log-probability"), plain_of(llama)
    last, z = {}, plain.z(task.ids)[3][:, -1, 2] @ plain.slices(3)[2]
    handle = plain.module.model.norm.register_forward_pre_hook(lambda _, args: last.update(x=args[0][:, -1]))
    plain(task.ids)
    handle.remove()
    scale, weight = last["x"].pow(2).mean(-1, keepdim=True).sqrt(), plain.module.model.norm.weight
    read = lambda x: value((weight * x / scale) @ plain.module.lm_head.weight.T, task, "log-probability")  # noqa: E731
    step = 0.02
    slope = (read(last["x"] + step * z) - read(last["x"] - step * z)) / (2 * step)
    near(torch.tensor(found.samples[:, 3, 2]).float(), slope, scale=200)


def test_half_precision_adds_up_too():
    model, task = fresh("llama", dtype="bfloat16"), task_of(tiny("llama"))
    found, exact = direct_attribution(model, task), direct_attribution(tiny("llama"), task)
    assert abs(found.samples - exact.samples).max() < 0.05 * abs(exact.samples).max() + 0.1


def test_a_stream_that_does_not_add_up_is_refused():
    model = fresh("llama")
    module = model.layers[1]._module
    module.register_forward_hook(lambda _, args, out: out * 1.5)
    with pytest.raises(ValueError, match="does not sum to the residual stream"):
        direct_attribution(model, task_of(model))


# ----------------------------------------------------------------------------------- gradients


def by_steps(plain, task, base, source, positions, step: float = 6e-3):
    """Attribution patching by finite differences, head by head, `[prompt, layer, head]`."""
    theirs, mask = plain.z(source), task.at(positions)
    ours = plain.z(base)
    found = torch.zeros(len(base), plain.n_layers, plain.n_heads)
    for i in range(plain.n_layers):
        for h in range(plain.n_heads):
            ends = []
            for sign in (1, -1):

                def change(layer, z, sign=sign):
                    if layer == i:
                        moved = z[:, :, h] + sign * step * (theirs[i] - ours[i])[:, :, h]
                        z[:, :, h] = torch.where(mask[..., None], moved, z[:, :, h])
                    return z

                with plain.edited(change):
                    ends.append(value(plain(base).logits[:, -1], task))
            found[:, i, h] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("positions", ["END", "all", "subject"])
def test_attribution_patching_equals_a_small_step(decoder, positions):
    task, plain = task_of(decoder, 3, twins="near"), plain_of(decoder)
    found = attribution_patching(decoder, task, positions=positions, batch=2)
    expected = by_steps(plain, task, task.ids, task.corrupted, positions)
    assert expected.abs().max() > 1e-2
    near(torch.tensor(found.samples).float(), expected, scale=100)
    near(torch.tensor(found.base).float(), value(plain(task.ids).logits[:, -1], task))
    near(torch.tensor(found.source).float(), value(plain(task.corrupted).logits[:, -1], task))


def test_denoising_takes_the_corrupted_run_as_base(llama):
    task, plain = task_of(llama, 3, twins="near"), plain_of(llama)
    found = attribution_patching(llama, task, direction="denoising", positions="all")
    near(torch.tensor(found.samples).float(), by_steps(plain, task, task.corrupted, task.ids, "all"), scale=100)
    near(torch.tensor(found.base).float(), value(plain(task.corrupted).logits[:, -1], task))


def test_mlps_have_a_first_order_effect_too(decoder):
    """The last layer's MLP goes straight into the final norm: compare with a step of its output."""
    task, module = task_of(decoder, 3, twins="near"), plain_of(decoder).module
    found = attribution_patching(decoder, task)
    mlp = plain_of(decoder).blocks[3].mlp
    outs, step = [], 2e-2
    handle = mlp.register_forward_hook(lambda _, args, out: outs.append(out.clone()))
    [module(input_ids=ids) for ids in (task.ids, task.corrupted)]
    handle.remove()
    ends = []
    for sign in (1, -1):

        def moved(_, args, out, sign=sign):
            out = out.clone()
            out[:, -1] += sign * step * (outs[1] - outs[0])[:, -1]
            return out

        handle = mlp.register_forward_hook(moved)
        ends.append(value(module(input_ids=task.ids).logits[:, -1], task))
        handle.remove()
    near(torch.tensor(found.mlp_samples[:, 3]).float(), (ends[0] - ends[1]) / (2 * step), scale=100)


def test_the_batch_and_the_order_of_prompts_change_nothing(llama):
    task, order = task_of(llama), [3, 1, 4, 0, 2]
    for verb in (direct_attribution, attribution_patching):
        found, other = verb(llama, task, batch=2), verb(llama, task[order])
        near(torch.tensor(found.samples[order]), torch.tensor(other.samples), scale=5)


def test_no_gradient_is_left_behind(llama):
    ids = ids_of(llama)
    attribution_patching(llama, task_of(llama))
    with llama.trace(ids):
        logits = llama.logits.save()
    assert not any(p.requires_grad or p.grad is not None for p in llama._module.parameters())
    assert not logits.requires_grad


# ------------------------------------------------------------------------------------ the lens


@pytest.mark.parametrize("metric", ["logit difference", "log-probability", "accuracy"])
def test_the_lens_ends_with_the_models_own_metric(decoder, metric):
    task = task_of(decoder)
    found = logit_lens(decoder, task, metric, batch=2)
    assert found.shape == (5, 5)
    near(found[-1], evaluate(decoder, task, metric))


def test_the_lens_equals_the_unembedding_of_each_stream(decoder):
    task, plain = task_of(decoder), plain_of(decoder)
    logits = [plain.capped(plain.unembed(plain.norm(x[:, -1]))) for x in plain.streams(task.ids)]
    by_hand = torch.stack([value(x, task) for x in logits])
    near(logit_lens(decoder, task)[:-1], by_hand)
    assert (logit_lens(decoder, task, "KL from the base run")[-1].abs() < 1e-5).all()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("verb", [direct_attribution, attribution_patching])
@pytest.mark.parametrize("metric", ["KL from the base run", "accuracy", "accuracy among options"])
def test_a_metric_without_gradient_is_refused_before_any_pass(verb, metric):
    task = task_of(tiny("llama"))
    with pytest.raises(ValueError, match=f"'{metric}.* has no useful gradient"):
        verb(None, task, metric)  # no model: nothing may run


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m, t: direct_attribution(m, t, reference="median"), LookupError, "Did you mean 'mean'. Known: None, mean"),
        (lambda m, t: attribution_patching(m, t, direction="up"), LookupError, "'up'. Known: noising, denoising"),
        (lambda m, t: attribution_patching(m, t, positions="object"), LookupError, "'object'.*Known: subject, END, all"),
        (lambda m, t: attribution_patching(m, t, "logit diff"), LookupError, "Did you mean 'logit difference'"),
        (lambda m, t: logit_lens(tiny("bert"), t), ValueError, "encoder"),
        (lambda m, t: direct_attribution(tiny("modernbert"), t), ValueError, "encoder"),
        (lambda m, t: attribution_patching(tiny("bert"), t), ValueError, "encoder"),
    ],
)
def test_bad_input_is_refused(llama, call, error, words):
    with pytest.raises(error, match=words):
        call(llama, task_of(llama))


@pytest.mark.parametrize("function", [heads.direct_attribution, heads.attribution_patching])
def test_gradients_are_taken_under_inference_mode_too(llama, function):
    task = task_of(llama)
    outside = function(llama, task)
    with torch.inference_mode():
        assert np.allclose(function(llama, task).values, outside.values, atol=1e-6)


def test_gradients_flow_past_forced_attention(llama):
    task = task_of(llama)
    length = task.ids.shape[1]
    with llama.edit() as (tracer, forced):
        forced.layers[2].attn.pattern[:, 1, -1] = torch.full((length,), 1 / length)
    assert abs(heads.attribution_patching(forced, task).values[0]).max() > 0
