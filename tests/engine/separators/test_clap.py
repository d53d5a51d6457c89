"""CLAP: known answers on tiny networks, files of others, tokenizers, and folders that are wrong."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.errors import DamagedError
from engine.separators.clap import Clap, ClapConfig, find_tokenizer, open_clap, read_clap, save_clap
from engine.separators.clap.layout import from_audiosep, from_hugging_face, from_laion, recognises
from tests.support.models.clap import TINY_AUDIO, TINY_TEXT, tiny_clap, tiny_tokenizer, write_tiny_clap

RATE_HZ = 48000


def snr_db(truth, guess):
    return float(10 * torch.log10(truth.square().sum() / (truth - guess).square().sum().clamp(min=1e-30)))


def noise(num_samples, seed=1):
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


@pytest.fixture(scope="module")
def clap():
    return tiny_clap(audio=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    write_tiny_clap(folder, audio=True)
    return folder


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)


def text_by_formula(clap, ids):
    """The text encoder as in the papers, in float64."""
    w = {name: value.double().numpy() for name, value in clap.state_dict().items()}
    heads, width = clap.config.text_heads, clap.config.text_width

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def erf(x):
        return torch.erf(torch.from_numpy(x)).numpy()

    p = "text_branch.embeddings."
    x = w[p + "word_embeddings.weight"][ids] + w[p + "position_embeddings.weight"][2 : 2 + len(ids)]
    x = norm(x + w[p + "token_type_embeddings.weight"][0], p + "LayerNorm")
    for layer in range(clap.config.text_layers):
        p = f"text_branch.encoder.layer.{layer}."
        q, k, v = (
            linear(x, f"{p}attention.self.{one}").reshape(len(ids), heads, -1).swapaxes(0, 1)
            for one in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(width / heads))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), width)
        x = norm(x + linear(mixed, p + "attention.output.dense"), p + "attention.output.LayerNorm")
        inner = linear(x, p + "intermediate.dense")
        x = norm(x + linear(inner * (1 + erf(inner / 2**0.5)) / 2, p + "output.dense"), p + "output.LayerNorm")
    pooled = np.tanh(linear(x[0], "text_branch.pooler.dense"))
    embedding = linear(np.maximum(linear(pooled, "text_projection.0"), 0), "text_projection.2")
    return torch.from_numpy(embedding / np.linalg.norm(embedding)).float()


def test_text_is_embedded_by_the_formula_whatever_it_is_padded_to(clap):
    texts = [[0, 5, 6, 7, 2], [0, 9, 2], [0, *range(10, 50), 2]]
    together_NE = clap.embed_ids(texts)
    for ids, vector_E in zip(texts, together_NE, strict=True):
        assert snr_db(text_by_formula(clap, ids), vector_E) > 110
        assert snr_db(vector_E, clap.embed_ids([ids])[0]) > 110
    assert snr_db(together_NE[0], together_NE[1]) < 20, "the embeddings are equal, so nothing is shown"
    assert clap.embed_ids([]).shape == (0, 512)


def test_words_are_tokenized_and_long_text_is_cut(folder):
    clap = open_clap(folder)
    vectors_NE = clap.embed_text(["dog", "x" * 2000, "x" * 62, "x" * 61])
    byte = {letter: 4 + number for number, letter in enumerate(sorted(_alphabet()))}
    assert torch.equal(vectors_NE.norm(dim=1).round(decimals=5), torch.ones(4))
    assert snr_db(clap.embed_ids([[0, *(byte[one] for one in "dog"), 2]])[0], vectors_NE[0]) > 110
    assert snr_db(vectors_NE[1], vectors_NE[2]) > 110 > snr_db(vectors_NE[2], vectors_NE[3])
    assert not vectors_NE.requires_grad and not vectors_NE.is_inference()


def _alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def test_audio_is_the_mean_over_windows_that_are_filled_by_repetition(clap):
    second_T = noise(4 * RATE_HZ)
    filled_T = np.concatenate([second_T, second_T, np.zeros(2 * RATE_HZ, np.float32)])
    short_E, filled_E = (clap.embed_audio(one, sample_rate_hz=RATE_HZ) for one in (second_T, filled_T))
    assert torch.equal(short_E, filled_E)
    both_E = clap.embed_audio(np.concatenate([filled_T, noise(10 * RATE_HZ, 2)]), sample_rate_hz=RATE_HZ)
    mean_E = filled_E + clap.embed_audio(noise(10 * RATE_HZ, 2), sample_rate_hz=RATE_HZ)
    assert snr_db(mean_E / mean_E.norm(), both_E) > 100
    assert snr_db(clap.embed_audio(noise(4410), sample_rate_hz=RATE_HZ), short_E) < 30


def test_audio_of_another_rate_is_resampled(clap):
    seconds = np.arange(10 * RATE_HZ) / RATE_HZ
    tones = [np.sin(2 * np.pi * 440 * seconds[: 10 * rate] * RATE_HZ / rate) for rate in (RATE_HZ, 16000)]
    high_E, low_E = (
        clap.embed_audio(one, sample_rate_hz=rate) for one, rate in zip(tones, (RATE_HZ, 16000), strict=True)
    )
    assert snr_db(high_E, low_E) > 10
    assert abs(float(high_E.norm()) - 1) < 1e-5


@pytest.mark.parametrize("samples_T", [np.zeros(100), np.zeros(0), np.full(9, np.nan), np.ones((2, 9))])
def test_audio_that_is_no_query(clap, samples_T):
    with pytest.raises(ValueError, match="audio query must be one channel of sound, finite and not silent"):
        clap.embed_audio(samples_T, sample_rate_hz=16000)


def laion_tensors(clap, prefix="module."):
    """As in LAION's file: with the tables of the audio encoder and with parts that nothing uses."""
    more = {
        "logit_scale_t": torch.zeros(()),
        "text_transform.sequential.0.weight": torch.zeros(4, 4),
        "text_branch.embeddings.position_ids": torch.arange(66)[None],
        "audio_branch.head.weight": torch.zeros(5, 5),
        "audio_branch.layers.0.blocks.1.attn_mask": torch.zeros(1, 64, 64),
        "audio_branch.layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64),
    }
    return {prefix + name: value for name, value in (clap.state_dict() | more).items()}


@pytest.fixture
def real_heads(monkeypatch):
    """A text encoder whose heads have 64 features, as released ones have."""
    monkeypatch.setitem(TINY_TEXT, "text_width", 64)
    monkeypatch.setitem(TINY_TEXT, "text_heads", 1)
    return tiny_clap(audio=True)


def test_a_file_of_laion(real_heads):
    tensors = laion_tensors(real_heads)
    assert recognises(tensors) and not recognises(["ss_model.x"])
    clap = from_laion(tensors)
    assert clap.config == real_heads.config and not clap.training
    assert torch.equal(clap.embed_ids([[0, 7, 2]]), real_heads.embed_ids([[0, 7, 2]]))
    audio = {"samples_T": noise(9000), "sample_rate_hz": RATE_HZ}
    assert torch.equal(clap.embed_audio(**audio), real_heads.embed_audio(**audio))


def test_the_encoder_in_a_file_of_audiosep_with_and_without_audio(real_heads):
    tensors = laion_tensors(real_heads, "query_encoder.model.") | {"ss_model.x": torch.zeros(1)}
    assert from_audiosep(tensors).config.audio_channels == TINY_AUDIO["audio_channels"]
    text_only = from_audiosep(
        {name: value for name, value in tensors.items() if "audio" not in name and "_a" not in name}
    )
    assert text_only.config.audio_channels == 0
    with pytest.raises(ValueError, match="must have an encoder of audio for a query of audio, got one without"):
        text_only.embed_audio(noise(100), sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.text_projection.2.bias": None}, r"1 missing \(text_projection\.2\.bias\)"),
        (
            {"module.text_projection.2.bias": torch.zeros(3)},
            r"1 of another shape \(text_projection\.2\.bias 3, not 512",
        ),
        ({"module.text_branch.adapter": torch.zeros(3)}, r"1 surplus \(text_branch\.adapter\)"),
        (
            {"module.text_projection.0.weight": None},
            "must have a text encoder, got none with the matrix text_projection",
        ),
        ({"module.audio_branch.norm.bias": None}, r"1 missing \(audio_branch\.norm\.bias\)"),
    ],
)
def test_every_tensor_of_a_file_is_accounted_for(real_heads, change, message):
    tensors = {name: value for name, value in (laion_tensors(real_heads) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_laion(tensors)


@pytest.fixture(scope="module")
def hugging_face():
    """A tiny ClapModel of random weights."""
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": 66, "layer_norm_eps": 1e-5, "projection_dim": 48}
    audio = {"patch_embeds_hidden_size": 8, "depths": [2, 1, 1, 1], "num_attention_heads": [2, 4, 8, 16]}
    audio |= {"hidden_size": 64, "projection_dim": 48}
    model = transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1))
        model.audio_model.audio_encoder.batch_norm.running_mean.fill_(-40)
        model.audio_model.audio_encoder.batch_norm.running_var.fill_(400)
    return model.eval()


@torch.no_grad()
def test_a_model_of_hugging_face_gives_its_embeddings(hugging_face):
    import transformers

    assert recognises(hugging_face.state_dict())
    clap = from_hugging_face(hugging_face.state_dict(), hugging_face.config.to_dict())
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    text = hugging_face.get_text_features(ids, attention_mask=(ids != 1).long()).pooler_output
    for theirs_E, mine_E in zip(text, clap.embed_ids([[0, 5, 6, 7, 2], [0, 9, 2]]), strict=True):
        assert snr_db(theirs_E / theirs_E.norm(), mine_E) > 110
    extract = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
    for num_samples in (3 * RATE_HZ + 17, 10 * RATE_HZ):
        features = extract(noise(num_samples), sampling_rate=RATE_HZ, return_tensors="pt")
        theirs_E = hugging_face.get_audio_features(**features).pooler_output[0]
        mine_E = clap.embed_audio(noise(num_samples), sample_rate_hz=RATE_HZ)
        assert snr_db(theirs_E / theirs_E.norm(), mine_E) > 110


def test_a_model_of_hugging_face_that_is_another(hugging_face):
    tensors, config = hugging_face.state_dict(), hugging_face.config.to_dict()
    fused = config | {"audio_config": config["audio_config"] | {"enable_fusion": True}}
    with pytest.raises(
        ValueError, match=r"enable_fusion of audio_config .* must be False, got True; give a CLAP without"
    ):
        from_hugging_face(tensors, fused)
    with pytest.raises(ValueError, match="must describe audio_config and text_config, got other values; copy it again"):
        from_hugging_face(tensors, config | {"text_config": "roberta"})
    key = "audio_model.audio_encoder.layers.0.blocks.0.attention.self.key.bias"
    with pytest.raises(ValueError, match=r"1 missing \(audio_branch\.layers\.0\.blocks\.0\.attn\.qkv\.bias\)"):
        from_hugging_face({name: value for name, value in tensors.items() if name != key}, config)


def test_a_folder_keeps_the_encoder_and_its_tokenizer(folder, clap):
    described = read_clap(folder)
    opened = open_clap(folder, fingerprint=described["fingerprint"])
    assert opened.config == clap.config and described["network"]["text_layers"] == 2
    assert torch.equal(opened.embed_ids([[0, 7, 2]]), clap.embed_ids([[0, 7, 2]]))
    assert find_tokenizer(folder) == find_tokenizer(folder / "tokenizer.json") == tiny_tokenizer()


def test_folders_that_are_no_encoder_or_another(folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no CLAP encoder in .*nowhere \(no clap\.json\); put the encoder's"):
        open_clap(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must have the fingerprint 0123456789abcdef, got .*; give the folder of the"):
        open_clap(folder, fingerprint="0123456789abcdef")
    save_clap(tiny_clap(), tmp_path, tokenizer=tiny_tokenizer(), about={"licence": "MIT"})
    assert read_clap(tmp_path)["licence"] == "MIT"
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer() + " ")
    with pytest.raises(DamagedError, match=r"tokenizer\.json"):
        open_clap(tmp_path)
    described = json.loads((tmp_path / "clap.json").read_text())
    (tmp_path / "clap.json").write_text(json.dumps(described | {"fingerprint": 16 * "0"}))
    with pytest.raises(DamagedError, match=r"clap\.json"):
        open_clap(tmp_path)
    (tmp_path / "clap.json").write_text(json.dumps(described | {"network": described["network"] | {"text_heads": 5}}))
    with pytest.raises(ValueError, match="text_heads must divide text_width 32, got 5"):
        open_clap(tmp_path)


def test_a_tokenizer_that_is_missing_is_named_and_found_later(tmp_path):
    write_tiny_clap(tmp_path, tokenizer=False)
    clap = open_clap(tmp_path)
    with pytest.raises(
        ValueError, match=rf"there is no tokenizer\.json in {tmp_path}, and FacebookAI/roberta-base or .*"
    ):
        clap.embed_text(["dog"])
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer())
    assert clap.embed_text(["dog"]).shape == (1, 512)


def roberta_files(folder):
    """vocab.json and merges.txt as RoBERTa's, of the tiny tokenizer."""
    model = json.loads(tiny_tokenizer())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_a_tokenizer_is_found_in_the_cache_and_made_of_its_parts(tmp_path, monkeypatch):
    assert find_tokenizer() is None
    roberta_files(tmp_path)
    made = Tokenizer.from_str(find_tokenizer(tmp_path))
    text = "Dog bark,\n ünd <mask>"
    assert made.encode(text).ids == Tokenizer.from_str(tiny_tokenizer()).encode(text).ids
    cached = {("roberta-base", name): str(tmp_path / name) for name in ("vocab.json", "merges.txt")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *key: cached.get(key))
    write_tiny_clap(tmp_path / "clap", tokenizer=False)
    assert open_clap(tmp_path / "clap").embed_text(["dog"]).shape == (1, 512)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"there is no tokenizer\.json, nor vocab\.json and merges\.txt, in "),
        (
            {"tokenizer.json": "{"},
            r"cannot read tokenizer\.json as a tokenizer \(.*\); give tokenizer\.json of FacebookAI",
        ),
        ({"tokenizer.json": b"\xff"}, r"cannot read .*tokenizer\.json \(.*utf-8.*\); give"),
        ({"vocab.json": "{}", "merges.txt": "a b c"}, r"cannot read .*vocab\.json and .*merges\.txt as a tokenizer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "must have the encoder's 261 tokens .*, got 6 tokens"),
    ],
)
def test_tokenizers_of_something_else(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        save_clap(tiny_clap(), tmp_path / "out", tokenizer=find_tokenizer(tmp_path))


def test_a_config_that_cannot_work():
    with pytest.raises(ValueError, match="text_heads must divide text_width 768, got 5; choose such as 1"):
        ClapConfig(text_heads=5)
    with pytest.raises(ValueError, match="must have an encoder of text for a query of text, got one without"):
        Clap(ClapConfig(text_layers=0, **TINY_AUDIO)).embed_text(["dog"])
