"""Other packages that train: the smallest script for each, as in docs/clients.md."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    )


def lora() -> Any:
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def betas1(optimizer: GrokAdamW) -> list[float]:
    return [row.beta1 for row in optimizer.layer_table()]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is frozen")
@pytest.mark.parametrize("adapted", [False, True], ids=["by name", "the preset, with LoRA"])
def test_trl(adapted: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", exc_type=ImportError)
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from grokadamw.huggingface import GrokAdamWCallback, for_grokking

    datasets.disable_progress_bars()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    data = datasets.Dataset.from_dict({"text": ["a b a b"] * 8})
    arguments = trl.SFTConfig(
        str(tmp_path), optim="grokadamw", learning_rate=0.01, weight_decay=0.1, max_steps=2, use_cpu=True, bf16=False,
        eval_strategy="steps", eval_steps=1, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    it = trl.SFTTrainer(
        llama(),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=lora() if adapted else None,
        callbacks=[GrokAdamWCallback()],
        optimizer_cls_and_kwargs=for_grokking(arguments) if adapted else None,
    )
    it.train()
    optimizer = it.optimizer.optimizer
    assert isinstance(optimizer, GrokAdamW)
    assert optimizer.defaults["alpha_init"] == (0.9 if adapted else 0.98)
    names = [name for row in optimizer.layer_table() for name in row.names]
    assert names == [name for name, param in it.model.named_parameters() if param.requires_grad]
    assert adapted == all("lora" in name for name in names)
    assert optimizer.param_groups[0]["eval_loss"] > 0
    assert len([logs for logs in it.state.log_history if "grok_alpha" in logs]) == 2


def test_peft() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = peft.get_peft_model(llama(), lora())
    before = {name: param.clone() for name, param in model.named_parameters()}
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01)
    tokens = torch.randint(2, 16, (4, 8))
    for _ in range(2):  # a factor of LoRA is 0 at first, so the other gets no gradient in the first step
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != ("lora" in name), name
    adapted = {row.layer for row in optimizer.layer_table() if any("lora" in name for name in row.names)}
    assert adapted == {1, 2}  # the model's layers, which come after its embedding
    with pytest.warns(UserWarning, match="of the model is frozen, as for fine-tuning with PEFT"):
        preset = GrokAdamW.for_grokking(model)
    assert all("lora" in name for group in preset.param_groups for name in group["param_names"])


def test_timm() -> None:
    timm, groups = pytest.importorskip("timm", exc_type=ImportError), pytest.importorskip("timm.optim")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=3)
    optimizer = GrokAdamW(groups.param_groups_weight_decay(model, 0.05), lr=1e-3)  # these groups have no names
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    with pytest.warns(UserWarning, match=r"β1 = 0.02.*call optimizer.set_layers\(model\)"):
        optimizer.step()
    assert min(betas1(optimizer)) < 0.03
    optimizer.set_layers(model)
    assert min(betas1(optimizer)) > 0.4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_skorch() -> None:
    skorch = pytest.importorskip("skorch", exc_type=ImportError)
    x, y = torch.randn(32, 8), torch.randint(2, (32,))
    module = functools.partial(nn.Sequential, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    net = skorch.NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=GrokAdamW,
        optimizer__lamb=1.0,
        lr=0.01,
        max_epochs=2,
        verbose=0,
    )
    net.initialize()
    net.optimizer_.set_layers(net.module_)
    net.partial_fit(x.numpy(), y.numpy())  # `fit` would make the module and the optimizer again
    optimizer = net.optimizer_
    assert isinstance(optimizer, GrokAdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["lamb"]) == (0.01, 1.0)
    assert [row.names for row in optimizer.layer_table()] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert optimizer.metrics()["step"] == 2


def test_fastai() -> None:
    learner = pytest.importorskip("fastai.learner", exc_type=ImportError)
    from fastai.data.core import DataLoaders
    from fastai.optimizer import OptimWrapper

    data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randn(32, 1))
    loaders = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=16) for _ in range(2)))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    it = learner.Learner(
        loaders, model, loss_func=nn.functional.mse_loss, opt_func=functools.partial(OptimWrapper, opt=GrokAdamW)
    )
    it.create_opt()
    it.opt.opt.set_layers(model)
    it.fit(2, lr=0.01, wd=0.1)
    optimizer = it.opt.opt
    assert isinstance(optimizer, GrokAdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.01, 0.1)}
    assert [row.names for row in optimizer.layer_table()] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert optimizer.metrics()["step"] == 4
