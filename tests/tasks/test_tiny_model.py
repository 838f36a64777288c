"""Laws of the base model: as good as promised, the same everywhere, and never half of one."""

import dataclasses
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from verl_m2po.tasks import arithmetic, supervision, tiny_model
from verl_m2po.tasks.tiny_model import Recipe

pytestmark = pytest.mark.slow

# Stops at the first measurement: enough for everything but the accuracy itself.
HASTY = Recipe(
    target_accuracy=1e-9,
    evaluate_every_steps=2,
    evaluation_problems=8,
    training_problems=32,
    batch_size=4,
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    heads=1,
    key_value_heads=1,
)
tokenizer = tiny_model.make_tokenizer()


def prompt_ids(text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(cache=tmp_path_factory.mktemp("cache"))


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    # Qwen2's tokenizer composes accents (NFC) first.
    import unicodedata

    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet="0123456789+", min_size=1, max_size=20))
def test_digits_are_one_token_each(text: str) -> None:
    assert len(tokenizer.encode(text)) == len(text)


def test_prompts_and_answers_are_as_short_as_the_chat_template_allows() -> None:
    # <|im_start|>user\n 5 characters <|im_end|>\n<|im_start|>assistant\n: 3 + 5 + 5 tokens.
    prompts, answers = supervision.encode_problems(tokenizer, 500, split="train", digits=2, seed=0)
    assert prompts.shape == (500, 13)
    assert answers.shape == (500, 4)
    lengths = (answers != supervision.NO_TOKEN).sum(dim=1)
    assert set(lengths.tolist()) == {3, 4}


def test_the_tensors_are_what_verl_will_see() -> None:
    prompts, answers = supervision.encode_problems(tokenizer, 50, split="validation", digits=2, seed=7)
    for row, prompt, answer in zip(arithmetic.rows(50, split="validation", seed=7), prompts, answers, strict=True):
        assert prompt.tolist() == prompt_ids(row["prompt"][0]["content"])
        response = answer[answer != supervision.NO_TOKEN]
        assert response[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert arithmetic.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"]) == 1.0


def test_the_folder_loads_as_what_was_saved(tmp_path: Path) -> None:
    folder = tiny_model.build(HASTY, cache=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, Qwen2ForCausalLM)
    assert isinstance(loaded, Qwen2Tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(loaded) == len(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        loaded.eos_token_id,
        loaded.pad_token_id,
    )
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "12+34"}]
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n12+34<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.apply_chat_template(chat)["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]


def test_verls_agent_loop_accepts_the_tokenizer(tmp_path: Path) -> None:
    from verl.utils.tokenizer import hf_tokenizer
    from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

    loaded = hf_tokenizer(str(tiny_model.build(HASTY, cache=tmp_path)))
    builder = QwenContinuousTokenBuilder(loaded)
    assert builder.build_initial_tokens([{"role": "user", "content": "12+34"}]) == prompt_ids("12+34")


def test_log_probs_do_not_depend_on_the_other_rows_or_on_padding() -> None:
    torch.manual_seed(0)
    model = tiny_model.make_model(HASTY, tokenizer)
    prompts, answers = supervision.encode_problems(tokenizer, 16, split="train", digits=2, seed=0)
    together = supervision.answer_log_probs(model, prompts, answers)
    for row in range(16):
        length = int((answers[row] != supervision.NO_TOKEN).sum())
        alone = supervision.answer_log_probs(model, prompts[row : row + 1], answers[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0])
        assert (together[row, length:] == 0).all()


def test_log_probs_are_those_of_one_token_after_the_other() -> None:
    torch.manual_seed(0)
    model = tiny_model.make_model(HASTY, tokenizer)
    prompts, answers = supervision.encode_problems(tokenizer, 4, split="train", digits=2, seed=0)
    found = supervision.answer_log_probs(model, prompts, answers)
    for row, answer in enumerate(answers.tolist()):
        text = prompts[row].tolist()
        for position, token in enumerate(token for token in answer if token != supervision.NO_TOKEN):
            logits = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(found[row, position], logits.log_softmax(-1)[token])
            text.append(token)


def test_the_base_model_is_right_about_a_third_of_the_time(base_model: Path) -> None:
    summary = json.loads((base_model / "recipe.json").read_text())
    assert summary["sampled_accuracy"] == pytest.approx(0.3, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    # Other problems than those that supervision was stopped on.
    held_out = supervision.encode_problems(tokenizer, 1000, split="validation", digits=2, seed=99)
    assert supervision.sampled_accuracy(model, *held_out) == pytest.approx(summary["sampled_accuracy"], abs=0.04)
    assert sum(parameter.numel() for parameter in model.parameters()) == 329_600


def test_the_accuracy_is_the_reward_of_sampled_responses(base_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model)
    prompts, answers = supervision.encode_problems(tokenizer, 512, split="validation", digits=2, seed=0)
    torch.manual_seed(0)
    sequences = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0
    )
    responses = tokenizer.batch_decode(sequences[:, prompts.shape[1] :], skip_special_tokens=True)
    rows = arithmetic.rows(512, split="validation")
    rewards = [
        arithmetic.compute_score(row["data_source"], response, row["reward_model"]["ground_truth"])
        for row, response in zip(rows, responses, strict=True)
    ]
    expected = supervision.sampled_accuracy(model, prompts, answers)
    deviation = math.sqrt(expected * (1 - expected) / 512)
    assert abs(sum(rewards) / 512 - expected) < 4 * deviation


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = tiny_model.build(HASTY, cache=tmp_path / "a")
    torch.manual_seed(2)
    torch.set_num_threads(2)
    second = tiny_model.build(HASTY, cache=tmp_path / "b")
    other = tiny_model.build(dataclasses.replace(HASTY, seed=1), cache=tmp_path / "b")
    assert torch.get_num_threads() == 2
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_building_does_not_disturb_the_callers_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_model.build(HASTY, cache=tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_cached_model_is_not_built_again(tmp_path: Path) -> None:
    folder = tiny_model.build(HASTY, cache=tmp_path)
    measurements: list[int] = []
    again = tiny_model.build(HASTY, cache=tmp_path, on_progress=lambda step, _: measurements.append(step))
    assert again == folder
    assert measurements == []


OTHER_VALUES = {"task": "column_addition"} | {
    field.name: field.default * 0.5 if isinstance(field.default, float) else field.default + 1  # type: ignore[operator]
    for field in dataclasses.fields(Recipe)
    if field.name != "task"
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_another_recipe_is_another_folder(name: str) -> None:
    assert tiny_model.folder_name(dataclasses.replace(Recipe(), **{name: OTHER_VALUES[name]})) != (
        tiny_model.folder_name(Recipe())
    )


@pytest.mark.parametrize("constant", ["FORMAT", "CHAT_TEMPLATE"])
def test_another_release_is_another_folder(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    before = tiny_model.folder_name(Recipe())
    monkeypatch.setattr(tiny_model, constant, getattr(tiny_model, constant) * 2)
    assert tiny_model.folder_name(Recipe()) != before


@pytest.mark.parametrize("missing", tiny_model.FILES)
def test_an_incomplete_model_is_built_again(tmp_path: Path, missing: str) -> None:
    folder = tiny_model.build(HASTY, cache=tmp_path)
    whole = (folder / missing).read_bytes()
    (folder / missing).unlink()
    assert tiny_model.build(HASTY, cache=tmp_path) == folder
    assert (folder / missing).read_bytes() == whole


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    hopeless = dataclasses.replace(HASTY, target_accuracy=0.99, max_steps=2)
    with pytest.raises(RuntimeError, match=r"max_steps=2 at an accuracy of 0.000, below target_accuracy=0.99"):
        tiny_model.build(hopeless, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_does_not_exist_before_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / tiny_model.folder_name(HASTY)
    seen: list[bool] = []
    tiny_model.build(HASTY, cache=tmp_path, on_progress=lambda *_: seen.append(folder.exists()))
    assert seen and not any(seen)


def test_two_builders_at_once_agree(tmp_path: Path) -> None:
    # The inner build finishes while the outer one is at work: the outer one keeps what it finds.
    inner: list[Path] = []
    weights: list[int] = []

    def build_meanwhile(*_: object) -> None:
        thread = threading.Thread(target=lambda: inner.append(tiny_model.build(HASTY, cache=tmp_path)))
        thread.start()
        thread.join()
        weights.append((inner[0] / "model.safetensors").stat().st_ino)

    outer = tiny_model.build(HASTY, cache=tmp_path, on_progress=build_meanwhile)
    assert inner == [outer]
    assert weights == [(outer / "model.safetensors").stat().st_ino]
    assert [path.name for path in tmp_path.iterdir()] == [outer.name]


def test_a_copy_goes_where_it_is_wanted(tmp_path: Path) -> None:
    out = tiny_model.build(HASTY, cache=tmp_path / "cache", out=tmp_path / "model")
    assert out == tmp_path / "model"
    assert {path.name for path in out.iterdir()} >= set(tiny_model.FILES)
    assert tiny_model.build(HASTY, cache=tmp_path / "cache", out=out) == out


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a model made by this package"):
        tiny_model.build(HASTY, cache=tmp_path / "cache", out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file.* Choose another folder"):
        tiny_model.build(HASTY, cache=tmp_path / "file")


def test_the_cache_is_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiny_model.default_cache() == tmp_path / "verl-m2po"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tiny_model.default_cache() == tmp_path / "home" / ".cache" / "verl-m2po"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("target_accuracy", 0.0), ("target_accuracy", 1.0)),
        *(("rate_near_target", 0.0), ("rate_near_target", 1.5)),
        ("batch_size", 0),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Recipe(**{name: value})  # pyright: ignore[reportArgumentType]
