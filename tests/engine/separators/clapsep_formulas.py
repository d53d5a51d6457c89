"""CLAPSep in plain numpy, float64: attention by groups of neighbours, no rolling, no masks, no tables of indices."""

import numpy as np
from scipy.special import erf, expit, softmax

FRAMES = 1024


def stem(weights, mix_T, query_Q, *, depths, heads):
    """The stem of a mixture at 32 kHz; ``weights`` have the names of a full file."""
    net = Net({name: value.double().numpy() for name, value in weights.items()}, heads)
    spectrum_NF = spectrum(mix_T, hop=320)
    picture = net.picture(to_48_khz(mix_T))
    mask_NF = net.mask(net.maps(picture, depths), np.abs(spectrum_NF), query_Q)
    return inverse(spectrum_NF * mask_NF, hop=320, num_samples=len(mix_T))


def to_48_khz(mix_T):
    """Each sample from a sinc of 6 zero crossings under a squared cosine, cut off at 99 % of 16 kHz."""
    at = 1.98 * (np.arange(len(mix_T))[None] / 2 - np.arange(-(-3 * len(mix_T) // 2))[:, None] / 3)
    return (0.99 * np.sinc(at) * np.cos(np.pi * at / 12) ** 2 * (np.abs(at) < 6)) @ mix_T


def hann():
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)


def spectrum(wave_T, *, hop):
    padded = np.pad(wave_T, 512, mode="reflect")
    return np.stack([np.fft.rfft(padded[i : i + 1024] * hann()) for i in range(0, len(wave_T) + 1, hop)])


def inverse(spectrum_NF, *, hop, num_samples):
    wave, weight = np.zeros((2, 1024 + hop * (len(spectrum_NF) - 1)))
    for i, frame_F in enumerate(spectrum_NF):
        wave[hop * i : hop * i + 1024] += hann() * np.fft.irfft(frame_F)
        weight[hop * i : hop * i + 1024] += hann() ** 2
    return (wave[512:] / np.maximum(weight[512:], 1e-11))[:num_samples]


def mel_bands(power_NF):
    """Powers of 64 bands of Slaney's scale, each a triangle of area 1, 50 Hz to 14 kHz."""
    mels = np.linspace(50 * 3 / 200, 15 + 27 * np.log(14) / np.log(6.4), 66)
    hz = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bins = np.arange(513) * 48000 / 1024
    triangles = [np.interp(bins, hz[i : i + 3], [0, 2 / (hz[i + 2] - hz[i]), 0]) for i in range(64)]
    return power_NF @ np.stack(triangles, axis=1)


class Net:
    """The network's parts by the names of their tensors."""

    def __init__(self, weights, heads):
        self.weights, self.heads = weights, heads

    def __getitem__(self, name):
        return self.weights[name]

    def linear(self, name, x):
        weight = self[f"{name}.weight"]
        if f"{name}.lora_A" in self.weights:
            narrow = self[f"{name}.lora_A"]
            weight = weight + self[f"{name}.lora_B"] @ narrow / len(narrow)
        return x @ weight.T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]

    def batch_norm(self, name, x):
        x = (x - self[f"{name}.running_mean"]) / np.sqrt(self[f"{name}.running_var"] + 1e-5)
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]

    def picture(self, wave_T):
        """Silence after the wave is silence of the power, -100 dB; frames go on in the next quarter of the rows."""
        power_NF = np.abs(spectrum(wave_T, hop=480)) ** 2
        power_NF = np.concatenate([power_NF, np.zeros((FRAMES - len(power_NF), 513))])
        levels = self.batch_norm("audio_branch.bn0", 10 * np.log10(np.maximum(mel_bands(power_NF), 1e-10)))
        return np.concatenate([quarter.T for quarter in np.split(levels, 4)])

    def maps(self, picture, depths):
        branch = "audio_branch."
        kernel = self[f"{branch}patch_embed.proj.weight"][:, 0]
        patches = picture.reshape(64, 4, 64, 4)
        embedded = np.einsum("hiwj,cij->hwc", patches, kernel) + self[f"{branch}patch_embed.proj.bias"]
        found = [self.norm(f"{branch}patch_embed.norm", embedded)]
        for stage, depth in enumerate(depths):
            x = found[-1]
            for block in range(depth):
                shift = 4 if block % 2 and len(x) > 8 else 0
                x = self.block(f"{branch}layers.{stage}.blocks.{block}", x, self.heads << stage, shift)
            if stage < 3:
                four = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
                name = f"{branch}layers.{stage}.downsample"
                x = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", np.concatenate(four, -1)))
            found.append(x)
        return found

    def block(self, name, x, heads, shift):
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x), heads, shift)
        inner = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        return x + self.linear(f"{name}.mlp.fc2", 0.5 * inner * (1 + erf(inner / 2**0.5)))

    def attention(self, name, x, heads, shift):
        """Positions see those of their group: 8 rows and columns, the groups at the edges of a shifted map fewer."""
        qkv, mixed = self.linear(f"{name}.qkv", x), np.zeros_like(x)
        table = self[f"{name}.relative_position_bias_table"]
        cuts = np.split(np.arange(len(x)), np.arange(shift or 8, len(x), 8))
        for rows in cuts:
            for columns in cuts:
                at = np.array([(row, column) for row in rows for column in columns])
                away = at[:, None] - at[None] + 7
                bias = table[15 * away[..., 0] + away[..., 1]]
                q, k, v = qkv[at[:, 0], at[:, 1]].reshape(len(at), 3, heads, -1).transpose(1, 2, 0, 3)
                logits = q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5 + bias.transpose(2, 0, 1)
                mixed[at[:, 0], at[:, 1]] = (softmax(logits, -1) @ v).transpose(1, 0, 2).reshape(len(at), -1)
        return self.linear(f"{name}.proj", mixed)

    def mask(self, maps, magnitude_NF, query_Q):
        head = "decoder_model."
        *encoded, x = maps
        x = self.skip(f"{head}film", x, query_Q, 0.0)
        for place, skipped in enumerate(encoded[::-1]):
            if place:
                name = f"{head}layers.{place}.downsample"
                x = self.norm(f"{name}.norm", spread(self.linear(f"{name}.expand", x)))
            x = self.block(f"{head}layers.{place}.blocks.0", x, self.heads << (3 - place), 0)
            x = self.skip(f"{head}skip.{place}", skipped, query_Q, x)
        x = self.norm(f"{head}inverse_patch_embed.norm", x)
        picture = np.einsum("hwc,cij->hiwj", x, self[f"{head}inverse_patch_embed.proj.weight"][:, 0]).reshape(256, 256)
        picture = picture + self[f"{head}inverse_patch_embed.proj.bias"]
        bands = np.concatenate([quarter.T for quarter in np.split(picture, 4)])[: len(magnitude_NF)]
        x = np.concatenate([self.batch_norm(f"{head}spec_norm", magnitude_NF), bands], axis=1)
        x = self.norm(f"{head}mask_net.1", self.linear(f"{head}mask_net.0", x))
        layer = 0
        while f"{head}mask_net.2.layers.{layer}.linear1.weight" in self.weights:
            x = self.transformer_layer(f"{head}mask_net.2.layers.{layer}", x)
            layer += 1
        return expit(self.linear(f"{head}mask_net.3", x))

    def skip(self, name, encoded, query_Q, x):
        scale, shift = (self.linear(f"{name}.skip_conv.{part}", query_Q) for part in ("gamma", "beta"))
        return self.norm(f"{name}.norm", scale * self.linear(f"{name}.feature_proj", encoded) + shift + x)

    def transformer_layer(self, name, x, heads=8):
        qkv = x @ self[f"{name}.self_attn.in_proj_weight"].T + self[f"{name}.self_attn.in_proj_bias"]
        q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        mixed = softmax(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5, -1) @ v
        mixed = self.linear(f"{name}.self_attn.out_proj", mixed.transpose(1, 0, 2).reshape(x.shape))
        x = self.norm(f"{name}.norm1", x + mixed)
        inner = np.maximum(self.linear(f"{name}.linear1", x), 0.0)
        return self.norm(f"{name}.norm2", x + self.linear(f"{name}.linear2", inner))


def spread(x):
    """Four quarters of the channels to four neighbours: x0, x2, x1, x3, where x1 is right of x0 and x2 below."""
    x0, x2, x1, x3 = np.split(x, 4, axis=-1)
    rows = [np.stack(pair, axis=2).reshape(len(x), -1, x0.shape[-1]) for pair in ((x0, x1), (x2, x3))]
    return np.stack(rows, axis=1).reshape(2 * len(x), 2 * len(x), -1)
