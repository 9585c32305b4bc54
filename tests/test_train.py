"""The training loop, the parameters of chosen heads, and peft's baselines."""

import math

import nnsight
import pytest
import torch
from conftest import ENCODERS, ids_of, logits_of, near, plain_of, tiny
from torch.nn.functional import cross_entropy
from toys import toy

import heads
from heads.lab import answers
from heads.lab.training import fit, parameters_of
from heads.lab.tuning import PARTS, lora, prompt_tuning

CHOSEN = [(1, 1), (2, 3), (2, 2)]
PAIRS = [("Q: big\nA:", " small"), ("Q: hot\nA:", " cold"), ("Q: light red\nA:", " dark"), ("Q: up\nA:", " down")]


def weights_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model._module.state_dict().items()}


def unchanged(model, before) -> None:
    after = model._module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def loss_on(model):
    return lambda batch: heads.answer_loss(model, batch)


# ------------------------------------------------------------------------------------ the loss


def test_answer_loss_is_the_mean_of_plain_losses_one_by_one(decoder):
    data, plain = heads.examples(decoder, PAIRS), plain_of(decoder)
    alone = []
    for item in data:
        ids = torch.tensor([[*item.prompt, *item.answer]])
        logits = plain(ids).logits[0, len(item.prompt) - 1 : -1]
        alone.append(cross_entropy(logits, ids[0, len(item.prompt) :]))
    near(heads.answer_loss(decoder, data), torch.stack(alone).mean())
    near(heads.answer_loss(decoder._module, data[:1]), alone[0])


def test_answer_loss_sees_the_edits_of_an_edited_model(llama):
    data = heads.examples(llama, PAIRS)
    with torch.no_grad():
        edited = heads.answer_loss(heads.ablate(llama, CHOSEN), data)
        assert (edited - heads.answer_loss(llama, data)).abs() > 1e-3
        alone = [heads.answer_loss(heads.ablate(llama, CHOSEN), [item]) for item in data]
    near(edited, torch.stack(alone).mean())


def test_scores_of_answers_are_those_of_plain_logits(decoder):
    data, plain = heads.examples(decoder, [*PAIRS, ("ab", " c")]), plain_of(decoder)
    found = heads.score_answers(decoder, data, batch=2)
    for item, score in zip(data, found, strict=True):
        ids = torch.tensor([[*item.prompt, *item.answer]])
        logits, gold = plain(ids).logits[0, len(item.prompt) - 1 : -1], ids[0, len(item.prompt) :]
        near(score.logprob, logits.log_softmax(-1).gather(-1, gold[:, None])[:, 0])
        assert torch.equal(score.correct, logits.argmax(-1) == gold) and not score.logprob.requires_grad
    near(heads.answer_loss(decoder, data), -torch.stack([score.logprob.mean() for score in found]).mean())
    assert heads.score_answers(decoder, []) == []


def test_scores_of_answers_see_edits_and_hooks(llama):
    data, vectors = heads.examples(llama, PAIRS), torch.ones(len(CHOSEN), 8)
    clean, steering = heads.score_answers(llama, data), heads.Steering(llama, vectors, heads=CHOSEN)
    with steering.hooks():
        hooked = heads.score_answers(llama, data)
    for before, ours, theirs in zip(clean, hooked, heads.score_answers(steering.edited, data), strict=True):
        near(ours.logprob, theirs.logprob)
        assert (ours.logprob - before.logprob).abs().max() > 1e-3


def test_what_has_no_answer_or_no_prompt_has_no_score(llama):
    one, both = answers.Example((5,), (6,)), r"a row of {} tokens, a prompt of {} among them: it needs at least one, and one to predict after it"
    with pytest.raises(ValueError, match="there are no examples"):
        heads.answer_loss(llama, [])
    for bad, counts in ((answers.Example((), (5, 6)), (2, 0)), (answers.Example((5, 6), ()), (2, 2))):
        for run in (heads.score_answers, heads.answer_loss):
            with pytest.raises(ValueError, match=both.format(*counts)):
                run(llama, [one, bad])
    with pytest.raises(ValueError, match=both.format(1, 1)):
        heads.token_losses(llama, [[5, 6], [7]])
    for batch, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="batch is"):
            heads.score_answers(llama, [one], batch=batch)


def test_a_long_answer_is_read_in_parts(llama):
    row = torch.randint(5, 200, (answers.CHUNK // 2 + 30,), generator=torch.Generator().manual_seed(0)).tolist()
    item = answers.Example(tuple(row[:2]), tuple(row[2:]))
    (score, again) = heads.score_answers(llama, [item, item])  # more targets than one part holds
    logits = plain_of(llama)(torch.tensor([row])).logits[0, 1:-1]
    near(score.logprob, -cross_entropy(logits, torch.tensor(row[2:]), reduction="none"))
    near(again.logprob, score.logprob)


def test_examples_are_tokenised_together_and_may_be_cut_or_ended(llama):
    (item,) = heads.examples(llama, [("ab", " cd")], end="\n")
    assert llama.tokenizer.decode(item.prompt) == "ab" and llama.tokenizer.decode(item.answer) == " cd\n"
    assert len(heads.examples(llama, [("ab", " cd")], first=1)[0].answer) == 1
    with pytest.raises(ValueError, match="must not be empty"):
        heads.examples(llama, [("ab", "")])


# ------------------------------------------------------------------------------------ the loop


def quadratic(start: float = 4.0):
    x = torch.full((3,), start, requires_grad=True)
    return x, lambda items: ((x - torch.tensor(items).mean()) ** 2).sum()


def test_training_goes_down_the_same_way_for_the_same_seed():
    runs = []
    for seed in (0, 0, 1):
        x, loss = quadratic()
        done = fit(x, loss, [0.5, 1.0, 1.5, 3.0, 9.0], steps=4 * 3, batch=2, lr=0.1, seed=seed)
        runs.append((done.losses, x.detach().clone()))
        assert len(done.losses) == done.kept == 4 * 3 and not done.failed
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_every_item_is_seen_once_an_epoch():
    seen, (x, loss) = [], quadratic()
    fit(x, lambda items: seen.extend(items) or loss(items), list(map(float, range(7))), steps=2 * 3, batch=3)
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(map(float, range(7))) and seen[:7] != seen[7:]


def test_linear_schedule():
    sizes, (x, loss) = [], quadratic(100.0)
    fit(x, lambda items: sizes.append(x[0].item()) or loss(items), [0.0], steps=10, lr=1.0, schedule="linear")
    moved = [a - b for a, b in zip(sizes, sizes[1:])]
    expected = [1 - n / 10 for n in range(9)]  # an Adam step has the size of the rate, here
    assert moved == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_stops_names_the_step_and_goes_back(bad):
    states, (x, loss) = [], quadratic()

    def broken(items):
        states.append(x.detach().clone())
        return loss(items) * (bad if len(states) == 4 else 1)

    with pytest.warns(RuntimeWarning, match="at step 3"):
        done = fit(x, broken, [0.0], steps=10, lr=0.1)
    assert done.failed and done.kept == 2 and len(done.losses) == 3 and torch.equal(x.detach(), states[2])


def test_a_bad_gradient_stops_before_the_update():
    states, (x, loss) = [], quadratic()

    def broken(items):
        states.append(x.detach().clone())
        return loss(items) + (x.sum() * 0).sqrt() if len(states) == 3 else loss(items)  # adds 0, with a slope of NaN

    with pytest.warns(RuntimeWarning, match="gradient is nan at step 2"):
        done = fit(x, broken, [0.0], steps=10, lr=0.1)
    assert done.failed and done.kept == 2 and torch.equal(x.detach(), states[2])


def test_a_loss_that_is_bad_from_the_start_leaves_everything_as_it_was():
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="step 0"):
        assert fit(x, lambda items: x.sum() * math.nan, [0], steps=3).kept == 0
    assert torch.equal(x.detach(), torch.ones(2))


def test_the_best_state_is_kept():
    values, states, (x, loss) = iter([5, 3, 4, math.nan, 6, 3.5]), [], quadratic()
    done = fit(x, loss, [0.0], steps=11, lr=0.1, every=2,
               validate=lambda: states.append(x.detach().clone()) or next(values))  # fmt: skip
    assert done.kept == 4 and len(done.losses) == 11
    assert torch.equal(x.detach(), states[1])
    assert [n for n, _ in done.validation] == [2, 4, 6, 8, 10, 11]


def test_the_best_state_is_kept_even_if_training_fails_later():
    calls, states, (x, loss) = [], [], quadratic()
    with pytest.warns(RuntimeWarning):
        fit(x, lambda items: calls.append(0) or loss(items) * (math.nan if len(calls) > 5 else 1), [0.0], steps=9, every=2,
            validate=lambda: states.append(x.detach().clone()) or len(states))  # fmt: skip
    assert torch.equal(x.detach(), states[0])


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"steps": 0}, ValueError, "at least 1"),
        ({"steps": 1, "batch": 0}, ValueError, "batch is at least 1, not 0"),
        ({"steps": 1.5}, TypeError, "steps is a whole number, not 1.5"),
        ({"steps": True}, TypeError, "steps is a whole number, not True"),
        ({"steps": 1, "every": 0}, ValueError, "every is at least 1, not 0"),
        ({"steps": 1, "schedule": "cosine"}, LookupError, "no schedule 'cosine'.*constant"),
    ],
)
def test_bad_arguments_are_refused(wrong, error, message):
    x, loss = quadratic()
    with pytest.raises(error, match=message):
        fit(x, loss, [1.0], **wrong)


def test_an_unknown_schedule_lists_the_known():
    x, loss = quadratic()
    with pytest.raises(LookupError, match="no schedule 'cosine'. Known: constant, linear"):
        fit(x, loss, [1.0], steps=1, schedule="cosine")


def test_nothing_to_train_is_refused():
    x, loss = quadratic()
    with pytest.raises(ValueError, match="data is empty"):
        fit(x, loss, [], steps=1)
    with pytest.raises(ValueError, match="carries no gradient"):
        fit(x, lambda items: torch.tensor(1.0), [1], steps=1)
    with pytest.raises(ValueError, match="no gradient reached"):
        fit(torch.zeros(1, requires_grad=True), lambda items: x.sum(), [1], steps=1)
    for what in ([], torch.zeros(1), [x * 2], {"a": x, "b": torch.zeros(1)}, tiny("llama")):
        with pytest.raises(ValueError, match="leaf tensors"):
            parameters_of(what)
    assert parameters_of({"a": x})[0] is parameters_of(x)[0] is x


# ------------------------------------------------------------------- the weights of chosen heads


def seen_by(model, ids):
    """q, k, v and z of every layer on some ids."""
    with torch.no_grad(), model.trace(input_ids=ids):
        found = nnsight.save([])
        for layer in model.layers:
            attn = layer.attn
            found.append({"q": attn.q.clone(), "k": attn.k.clone(), "v": attn.v.clone(), "z": attn.heads.clone()})
    return found


@pytest.mark.parametrize("part", PARTS)
def test_a_slice_belongs_to_its_head_and_to_no_other(any_model, part):
    """An oracle for every layout: moving the slice moves what the trace shows of this head, and nothing else there."""
    ids, layer, head = ids_of(any_model), 2, 3
    group = any_model.anatomy.n_heads // any_model.anatomy.n_kv_heads
    before, tuned = seen_by(any_model, ids)[layer], heads.head_weights(any_model, [(layer, head)], parts=part)
    with tuned:
        for p in tuned.parameters():
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        after = seen_by(any_model, ids)[layer]
        outs = heads.head_outputs(any_model, layer, after["z"])
    if part == "o":
        moved = (outs != heads.head_outputs(any_model, layer, after["z"])).any(-1).any(1)[0]
        assert moved.nonzero().flatten().tolist() == [head]
        return
    mine = head if part == "q" else head // group
    moved = (after[part] != before[part]).any(-1).any(1)[0]
    assert moved.nonzero().flatten().tolist() == [mine]
    for other in set("qkv") - {part}:
        assert torch.equal(after[other], before[other])


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_other_weight_stays_to_the_bit_also_under_weight_decay(decoder, weight_decay):
    before, data = weights_of(decoder), heads.examples(decoder, PAIRS)
    tuned = heads.head_weights(decoder, CHOSEN)
    with tuned:
        done = fit(tuned, loss_on(decoder), data, steps=4, batch=4, lr=1e-2, weight_decay=weight_decay)
        inside, changed = weights_of(decoder), 0
        modules = dict(decoder._module.named_modules())
        for name in before:
            module, _, tensor = name.rpartition(".")
            now = getattr(modules[module], tensor)  # what the forward pass uses
            changed += (now != before[name]).sum().item()
    assert done.losses[-1] < done.losses[0]
    assert changed == tuned.count, "as many numbers changed as are counted"
    assert all(torch.equal(inside[name], before[name]) for name in set(inside) & set(before))
    unchanged(decoder, before)
    assert not any(p.requires_grad for p in decoder._module.parameters())


def test_the_count_is_honest_about_shared_keys_and_values(llama):
    """Llama: d_model 32, d_head 8, 4 heads in 2 groups."""
    one = heads.head_weights(llama, [(0, 0)])
    assert one.counts == dict.fromkeys("qkvo", 8 * 32) and one.shared == [(0, 1)] and "shared with 1 other" in repr(one)
    both = heads.head_weights(llama, [(0, 0), (0, 1)])
    assert both.counts == {"q": 512, "k": 256, "v": 256, "o": 512} and both.shared == []
    assert heads.head_weights(llama, [(0, 0)], parts="qo").shared == []
    biased = heads.head_weights(tiny("gpt2"), [(0, 0)])
    assert biased.counts == {"q": 8 * 33, "k": 8 * 33, "v": 8 * 33, "o": 8 * 32}
    assert one.count == sum(p.numel() for p in one.parameters())


def test_attached_weights_are_no_op_then_a_tuned_model_then_gone(decoder):
    ids, data = ids_of(decoder), heads.examples(decoder, PAIRS)
    clean, tuned = logits_of(decoder, ids), heads.head_weights(decoder, CHOSEN)
    assert torch.equal(logits_of(decoder, ids), clean)
    with tuned:
        assert torch.equal(logits_of(decoder, ids), clean)
        fit(tuned, loss_on(decoder), data, steps=2, lr=1e-2)
        found = logits_of(decoder, ids)
        assert not torch.equal(found, clean)
        ablated = logits_of(heads.ablate(decoder, CHOSEN), ids)  # edits of a tuned model
        assert not torch.equal(ablated, found)
    assert torch.equal(logits_of(decoder, ids), clean)
    with tuned:
        assert torch.equal(logits_of(decoder, ids), found)


def test_two_at_once_and_bad_choices_are_refused(llama):
    with heads.head_weights(llama, [(0, 0)]):
        with pytest.raises(ValueError, match="being tuned already"):
            heads.head_weights(llama, [(0, 3)])
    for wrong, error in (([(9, 0)], IndexError), ([], ValueError)):
        with pytest.raises(error):
            heads.head_weights(llama, wrong)
    with pytest.raises(ValueError, match="'q', 'k', 'v' and 'o'"):
        heads.head_weights(llama, [(0, 0)], parts="z")


def test_all_weights_train_and_are_given_back_even_if_it_fails(decoder):
    before, data = weights_of(decoder), heads.examples(decoder, PAIRS)
    with pytest.raises(RuntimeError, match="on purpose"), heads.all_weights(decoder) as weights:
        assert len(weights) == len(list(decoder._module.parameters())) and all(weight.requires_grad for weight in weights)
        fit(weights, loss_on(decoder), data, steps=2, lr=1e-2)
        assert not all(torch.equal(tensor, before[name]) for name, tensor in decoder._module.state_dict().items())
        raise RuntimeError("on purpose")
    unchanged(decoder, before)
    assert not any(p.requires_grad or p.grad is not None for p in decoder._module.parameters())


# ------------------------------------------------------------------------------------ baselines


def test_all_weights_are_given_back_to_the_bit_even_if_training_fails(decoder):
    before, data = weights_of(decoder), heads.examples(decoder, PAIRS)
    with heads.all_weights(decoder) as weights:
        done = fit(weights, loss_on(decoder), data, steps=3, batch=4, lr=1e-2)
        assert done.losses[-1] < done.losses[0] and not torch.equal(weights[0], next(iter(before.values())))
    unchanged(decoder, before)
    with pytest.raises(RuntimeError, match="on purpose"), heads.all_weights(decoder) as weights:
        assert all(weight.requires_grad for weight in weights)
        with torch.no_grad():
            weights[0].add_(1)
        raise RuntimeError("on purpose")
    unchanged(decoder, before)
    assert not any(weight.requires_grad or weight.grad is not None for weight in decoder._module.parameters())


def test_lora_trains_and_leaves_no_trace(decoder):
    before, ids, data = weights_of(decoder), ids_of(decoder), heads.examples(decoder, PAIRS)
    clean = logits_of(decoder, ids)
    with lora(decoder, rank=2, parts="qv") as adapter:
        assert torch.equal(logits_of(decoder, ids), clean), "B starts at zero"
        done = fit(adapter, loss_on(decoder), data, steps=4, batch=4, lr=1e-2)
        assert done.losses[-1] < done.losses[0] and not torch.equal(logits_of(decoder, ids), clean)
        count = adapter.count
    unchanged(decoder, before)
    assert torch.equal(logits_of(decoder, ids), clean)
    fused = {"gpt2": [96], "gpt-neox": [96], "phi3": [64]}
    wide = ("qwen3", "gemma", "gemma2", "gemma3")  # heads of 16, not 8
    family = decoder.record["name"].removeprefix("tiny-")
    widths = fused.get(family, [64, 32] if family in wide else [32, 16])  # of what makes queries and values
    assert count == 4 * sum(2 * (32 + width) for width in widths)


def test_prompt_tuning_trains_only_its_embeddings(decoder):
    before, data = weights_of(decoder), heads.examples(decoder, PAIRS)
    with prompt_tuning(decoder, tokens=3, text="go") as adapter:
        table = decoder._module.get_input_embeddings().weight
        start = adapter.parameters()[0].detach().clone()
        assert adapter.count == 3 * 32 and torch.equal(start, table[decoder.tokenizer("gog").input_ids])
        one_by_one = torch.stack([heads.answer_loss(adapter.module, [item]) for item in data]).mean()
        near(heads.answer_loss(adapter.module, data), one_by_one)
        done = fit(adapter, loss_on(adapter.module), data, steps=4, batch=4, lr=1e-2)
    assert done.losses[-1] < done.losses[0]
    unchanged(decoder, before)


def test_adapters_are_the_same_for_the_same_seed(llama):
    drawn = []
    for seed in (0, 0, 1):
        with lora(llama, rank=2, seed=seed) as adapter:
            drawn.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_encoders_can_be_tuned_too():
    for family in ENCODERS:
        model, ids = tiny(family), ids_of(tiny(family))
        tuned = heads.head_weights(model, [(1, 2)])
        with tuned:
            fit(tuned, lambda rows: model._module(input_ids=ids).logits.square().mean(), [0], steps=2, lr=1e-2)


def test_what_has_no_token_is_refused(llama):
    with pytest.raises(ValueError, match="an empty prompt before 'abc'"):
        heads.examples(llama, [("xyz", "abc"), ("", "abc")])
    with pytest.raises(ValueError, match="first is at least 1, not 0"):
        heads.examples(llama, [("xyz", "abc")], first=0)


@pytest.mark.parametrize("arguments, error, words", [
    (dict(parts="x"), ValueError, "parts='x'"), (dict(parts=""), ValueError, "parts=''"),
    (dict(layers=[9]), IndexError, "layers 0 to 3"), (dict(layers=[]), ValueError, "no layers"),
])  # fmt: skip
def test_bad_adapters_are_refused(llama, arguments, error, words):
    with pytest.raises(error, match=words), heads.lora(llama, **arguments):
        pass
    with pytest.raises(ValueError, match="tokens=0"), heads.prompt_tuning(llama, tokens=0):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # a Linear and a Conv1D
def test_an_adapter_of_the_output_projection_is_seen_by_what_reads_its_weight(family):
    model = tiny(family)
    task = toy(model, prompts=3)
    with lora(model, rank=2, parts="o") as adapter, torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2)
        fast, slow = (heads.path_scores(model, task, engine=engine, progress=False) for engine in ("fast", "literal"))
        near(torch.tensor(fast.samples), torch.tensor(slow.samples), scale=4)
        # and an edit of a head goes through the adapter: the sweep, which hooks modules, is the second opinion
        swept = heads.ablation_scores(model, task, "zero", progress=False).samples[:, 1, 1]
        cut = heads.evaluate(heads.ablate(model, [(1, 1)]), task) - heads.evaluate(model, task)
        near(cut, torch.tensor(swept).float(), scale=4)
        direct = heads.direct_attribution(model, task)
        whole = direct.samples.sum((1, 2)) + direct.mlp_samples.sum(1) + direct.embedding + direct.biases
        near(torch.tensor(whole), torch.tensor(direct.base), scale=4)
