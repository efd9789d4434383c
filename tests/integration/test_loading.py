"""Loading: an adapter's model is the one that was trained, merged or not; whatever is not whole is refused by name."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    LlamaForSequenceClassification,
)
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from trl_dynamics import loading, stats_head
from trl_dynamics.probing.generate import LocalModel, Request, Sampling
from trl_dynamics.stats_head import StatsRequest

IDS = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])
LM = {"task_type": "CAUSAL_LM"}
GROWN = VOCAB_SIZE + 5
# Name -> adapter, whether the base's head is tied to its embeddings, and how many tokens the base had in training.
MERGEABLE = {
    "lora": (peft.LoraConfig(**LM), False, VOCAB_SIZE),
    "lora_of_no_task": (peft.LoraConfig(target_modules=["q_proj"]), False, VOCAB_SIZE),
    "dora": (peft.LoraConfig(use_dora=True, **LM), False, VOCAB_SIZE),
    "lora_with_biases": (peft.LoraConfig(bias="all", **LM), False, VOCAB_SIZE),
    "head": (peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LM), False, VOCAB_SIZE),
    "tied_head": (peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LM), True, VOCAB_SIZE),
    "whole_modules": (peft.LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **LM), False, VOCAB_SIZE),
    "tied_whole_modules": (peft.LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **LM), True, VOCAB_SIZE),
    "tokens": (peft.LoraConfig(trainable_token_indices=[1, 42], **LM), False, VOCAB_SIZE),
    "tied_tokens": (peft.LoraConfig(trainable_token_indices=[1, 42], **LM), True, VOCAB_SIZE),
    "grown": (peft.LoraConfig(**LM), False, GROWN),
    "tied_grown": (peft.LoraConfig(**LM), True, GROWN),
    "grown_whole_modules": (peft.LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **LM), False, GROWN),
    "tied_grown_tokens": (peft.LoraConfig(trainable_token_indices=[VOCAB_SIZE], **LM), True, GROWN),
    "ia3": (peft.IA3Config(**LM), False, VOCAB_SIZE),
    "oft": (peft.OFTConfig(oft_block_size=4, **LM), False, VOCAB_SIZE),
    "vera": (peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **LM), False, VOCAB_SIZE),
    "lokr": (peft.LoKrConfig(target_modules=["q_proj", "v_proj"], **LM), False, VOCAB_SIZE),
    "norms": (peft.LNTuningConfig(target_modules=["input_layernorm"], **LM), False, VOCAB_SIZE),
}
UNMERGEABLE = {
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3, **LM), False, VOCAB_SIZE),
    "p_tuning": (peft.PromptEncoderConfig(num_virtual_tokens=3, **LM), False, VOCAB_SIZE),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=3, **LM), False, VOCAB_SIZE),
    "adaption_prompt": (peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **LM), False, VOCAB_SIZE),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two whole models with tokenizer and end-of-turn ids: one with a head of its own, one with a tied head."""
    root = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        model.generation_config.eos_token_id = [257, 9]
        model.save_pretrained(root / str(tied))
        tiny_tokenizer().save_pretrained(root / str(tied))
    return root


def logits(model) -> torch.Tensor:
    """Of the given tokens alone: some adapters put tokens of their own in front."""
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def trained(bases, folder, config, tied=False, num_tokens=VOCAB_SIZE):
    """An adapter's folder, and the logits of the model as it was in training."""
    base = loading.load_causal_lm(str(bases / str(tied)))
    if num_tokens != VOCAB_SIZE:
        base.resize_token_embeddings(num_tokens, mean_resizing=False)
    model = peft.get_peft_model(base, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MERGEABLE, *UNMERGEABLE])
def test_an_adapter_s_model_is_the_one_that_was_trained(name, bases, tmp_path):
    config, tied, num_tokens = (MERGEABLE | UNMERGEABLE)[name]
    expected = trained(bases, tmp_path / "adapter", config, tied, num_tokens)
    model = loading.load_causal_lm(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    base = logits(loading.load_causal_lm(str(bases / str(tied))))
    assert not torch.allclose(base, expected[..., :VOCAB_SIZE], atol=0.1)
    if name in UNMERGEABLE:
        with pytest.raises(loading.NotLoadable, match="cannot be merged"):
            loading.merged(model, "adapter")
        return
    loading.merged(model, "adapter").save_pretrained(tmp_path / "whole")
    whole = loading.load_causal_lm(str(tmp_path / "whole"))
    assert not hasattr(whole, "peft_config")
    torch.testing.assert_close(logits(whole), expected, atol=2e-5, rtol=0)
    loading.require_whole(str(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_stays_tied_unless_the_adapter_moved_it(bases, tmp_path):
    for name, tied in (("tied_grown", True), ("tied_head", False)):
        trained(bases, tmp_path / name, *MERGEABLE[name])
        whole = loading.merged(loading.load_causal_lm(str(tmp_path / name)), name)
        assert whole.config.tie_word_embeddings is tied
        assert (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight) is tied


def test_what_an_adapter_lacks_is_its_base_s(bases, tmp_path):
    trained(bases, tmp_path / "adapter", *MERGEABLE["lora"])
    path = str(tmp_path / "adapter")
    assert len(loading.load_tokenizer(path)) == len(tiny_tokenizer())
    assert loading.context_length(path) == 512 and loading.end_ids(path) == [257, 9]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(path)
    assert "<new>" in loading.load_tokenizer(path).get_vocab()


def test_only_a_trainable_adapter_requires_gradients_and_nothing_else(bases, tmp_path):
    trained(bases, tmp_path / "adapter", *MERGEABLE["lora"])
    for trainable in (False, True):
        model = loading.load_causal_lm(str(tmp_path / "adapter"), trainable=trainable)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(names) is trainable and all("lora_" in name for name in names)


def test_loading_draws_no_random_numbers_of_the_caller_s(bases, tmp_path):
    trained(bases, tmp_path / "adapter", *MERGEABLE["grown"])
    state = torch.random.get_rng_state()
    loading.load_causal_lm(str(tmp_path / "adapter"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_adapter_on_an_adapter_is_put_on_the_merged_model(bases, tmp_path):
    trained(bases, tmp_path / "first", *MERGEABLE["lora"])
    merged = loading.merged(loading.load_causal_lm(str(tmp_path / "first")), "first")
    merged.save_pretrained(tmp_path / "True")
    expected = trained(tmp_path, tmp_path / "second", MERGEABLE["lora"][0], True)
    rebase(tmp_path / "second", str(tmp_path / "first"))
    torch.testing.assert_close(logits(loading.load_causal_lm(str(tmp_path / "second"))), expected, atol=2e-5, rtol=0)


def test_a_relative_base_is_found_from_a_folder_above_the_adapter(bases, tmp_path, monkeypatch):
    expected = trained(bases, tmp_path / "runs/sft", *MERGEABLE["lora"])
    shutil.copytree(bases / "False", tmp_path / "runs/base")
    rebase(tmp_path / "runs/sft", "runs/base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(loading.load_causal_lm(str(tmp_path / "runs/sft"))), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", ["runs/new", "/nowhere/runs/new"])
def test_a_merged_base_moves_with_its_run(place, bases, tmp_path):
    expected = trained(bases, tmp_path / "moved/checkpoint-1", *MERGEABLE["lora"])
    shutil.copytree(bases / "False", tmp_path / "moved/merged_1")
    rebase(tmp_path / "moved/checkpoint-1", f"{place}/merged_1")
    with pytest.raises(loading.NotLoadable):
        loading.load_causal_lm(str(tmp_path / "moved/checkpoint-1"))
    (tmp_path / "moved/merged_1" / loading.MERGED_FROM).write_text("{}")
    model = loading.load_causal_lm(str(tmp_path / "moved/checkpoint-1"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_a_checkpoint_of_fsdp_is_its_adapter(bases, tmp_path):
    expected = trained(bases, tmp_path, *MERGEABLE["lora"])
    torch.save({}, tmp_path / "pytorch_model_fsdp.bin")
    torch.testing.assert_close(logits(loading.load_causal_lm(str(tmp_path))), expected, atol=1e-5, rtol=0)


def test_a_fault_of_this_package_is_no_fault_of_a_model(monkeypatch):
    def fault():
        return None.config

    monkeypatch.setattr("trl_dynamics.errors.PACKAGE_ROOT", Path(__file__).parent)
    with pytest.raises(AttributeError), loading.naming("model"):
        fault()
    with pytest.raises(loading.NotLoadable), loading.naming("model"):
        json.loads("{")


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_other_files_of_a_whole_model(kind, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind == "sharded":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(loading.load_causal_lm(str(tmp_path))), logits(model))
    loading.require_whole(str(tmp_path))


def rebase(adapter, base: str | None) -> None:
    """Write another base into an adapter's config."""
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path, part: str) -> None:
    """A safetensors file without the weights whose names have that part."""
    kept = {name: weight for name, weight in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})


def whole(folder, model=None):
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def headless(folder, bases):
    without(whole(folder) / "model.safetensors", "lm_head")


def layerless(folder, bases):
    without(whole(folder) / "model.safetensors", "layers.1.mlp.up_proj")


def backbone(folder, bases):
    whole(folder, tiny_model().model)


def classifier(folder, bases):
    whole(folder, LlamaForSequenceClassification(tiny_model().config))


def tied_classifier(folder, bases):
    whole(folder, LlamaForSequenceClassification(tiny_model(tie_word_embeddings=True).config))


def encoder_decoder(folder, bases):
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    whole(folder, BartForConditionalGeneration(BartConfig(vocab_size=VOCAB_SIZE, d_model=16, **sizes)))


def other_shape(folder, bases):
    edit(whole(folder) / "config.json", intermediate_size=48)


def cut_weights(folder, bases):
    with open(whole(folder) / "model.safetensors", "r+b") as file:
        file.truncate(500)


def lost_shard(folder, bases):
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()


def no_model(folder, bases):
    whole(folder / "checkpoint-7")


def broken_config(folder, bases):
    (whole(folder) / "config.json").write_text("{oops")


def base_is_gone(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    rebase(folder, "/nowhere/base")


def base_unnamed(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    rebase(folder, None)


def base_is_another(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    rebase(folder, str(whole(folder.parent / "one_layer", tiny_model(num_hidden_layers=1))))


def no_adapter_weights(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    (folder / "adapter_model.safetensors").unlink()


def gap_in_adapter(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    without(folder / "adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_A")


def cut_adapter(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(500)


def newer_adapter(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    edit(folder / "adapter_config.json", peft_type="NEXT")


def classifier_s_adapter(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    edit(folder / "adapter_config.json", task_type="SEQ_CLS")


def both_in_one_folder(folder, bases):
    trained(bases, folder, *MERGEABLE["lora"])
    whole(folder)


REFUSED = {
    headless: "no weights for 'lm_head.weight'",
    backbone: "lm_head",
    layerless: "no weights for 'model.layers.1.mlp.up_proj.weight'",
    classifier: "LlamaForSequenceClassification",
    tied_classifier: "LlamaForSequenceClassification",
    encoder_decoder: "encoder-decoder",
    other_shape: "mlp.down_proj.weight",
    cut_weights: "damaged or missing",
    lost_shard: "model-00002",
    no_model: "checkpoint-7",
    broken_config: "config.json",
    base_is_gone: "'/nowhere/base' does not exist",
    base_unnamed: "names no base",
    base_is_another: "layers.1",
    no_adapter_weights: "adapter_model.safetensors",
    gap_in_adapter: "layers.1.self_attn.q_proj.lora_A",
    cut_adapter: "damaged or missing",
    newer_adapter: "'NEXT' is unknown",
    classifier_s_adapter: "SEQ_CLS",
    both_in_one_folder: "model.safetensors",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_not_whole_is_refused_in_one_line(make, bases, tmp_path):
    make(tmp_path / "model", bases)
    with pytest.raises(loading.NotLoadable) as refusal:
        loading.load_causal_lm(str(tmp_path / "model"))
    text = str(refusal.value)
    assert str(tmp_path / "model") in text and REFUSED[make] in text and "\n" not in text


@pytest.mark.parametrize(
    "make", [headless, layerless, classifier, encoder_decoder, other_shape], ids=lambda m: m.__name__
)
def test_gaps_are_found_without_reading_weights(make, bases, tmp_path):
    make(tmp_path / "model", bases)
    with pytest.raises(loading.NotLoadable, match=REFUSED[make]):
        loading.require_whole(str(tmp_path / "model"))
    loading.require_whole(str(bases / "True"))


def test_zero3_does_not_split_what_is_looked_at(bases, tmp_path):
    headless(tmp_path, bases)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        loading.require_whole(str(bases / "False"))
        with pytest.raises(loading.NotLoadable, match="lm_head.weight"):
            loading.require_whole(str(tmp_path))
        assert config.is_zero3() and is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


def test_a_backbone_with_no_head_is_refused_by_its_class(bases, tmp_path):
    backbone(tmp_path, bases)
    with pytest.raises(loading.NotLoadable, match="LlamaModel"):
        loading.require_whole(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "damaged"])
def test_a_model_without_tokenizer_is_refused(kind, tmp_path):
    """GPT-2's class makes a tokenizer without any file, which reads no text."""
    if kind == "gpt2":
        GPT2Config().save_pretrained(tmp_path)
    else:
        tiny_model().save_pretrained(tmp_path)
    if kind == "damaged":
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{oops")
    with pytest.raises(loading.NotLoadable, match="damaged" if kind == "damaged" else "holds no tokenizer"):
        loading.load_tokenizer(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_line():
    for load in (loading.load_causal_lm, loading.load_tokenizer, loading.context_length):
        with pytest.raises(loading.NotLoadable, match="model 'nobody/no-such-model' cannot be loaded") as refusal:
            load("nobody/no-such-model")
        assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["prompt", "prefix", "adaption_prompt", "dora"])
def test_statistics_are_those_of_the_model_s_own_logits(name, bases, tmp_path):
    """A learned prompt shifts the positions; adaption prompts call a forward that the stats head has to reach."""
    expected = trained(bases, tmp_path, *(MERGEABLE | UNMERGEABLE)[name]).log_softmax(-1)[0, :-1]
    model = loading.load_causal_lm(str(tmp_path))
    stats_head.install(model)
    cols = torch.arange(IDS.shape[1] - 1)
    request = StatsRequest(torch.zeros_like(cols), cols, IDS[0, 1:], IDS.shape[1])
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), stats_request=request)["target_logp"]
    torch.testing.assert_close(found, expected.gather(1, IDS[0, 1:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "prompt", "p_tuning", "prefix"])
def test_answers_do_not_depend_on_what_shares_their_batch(name, bases, tmp_path):
    trained(bases, tmp_path, *(MERGEABLE | UNMERGEABLE)[name])
    requests = [Request.of(prompt, Sampling(6)) for prompt in ("Once upon a time", "Why?", "A", "Who?")]
    found = []
    for batch_size in (1, 4):
        generator = LocalModel.load(str(tmp_path), dtype="float32", batch_size=batch_size)
        found.append({request.prompt: answer.text for request, answer in generator.generate(requests)})
    assert found[0] == found[1] and len(found[0]) == 4
