"""The Fourier transforms of the separators: those of torch, with and without gradients."""

import pytest
import torch

from engine.separators.network import transforms


@pytest.mark.parametrize(("size", "hop"), [(1024, 256), (2048, 320), (256, 64), (100, 33)])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_transforms_are_torchs(size, hop, needs_grad):
    mix_BT, window = torch.randn(2, 7001), torch.hann_window(size)
    with torch.set_grad_enabled(needs_grad):
        padded_BT = torch.nn.functional.pad(mix_BT, (size // 2, size // 2), mode="reflect")
        spectrum_BNF = transforms.stft(padded_BT, window, hop)
        expected_BFN = torch.stft(mix_BT, size, hop, window=window, return_complex=True)
        torch.testing.assert_close(spectrum_BNF.mT, expected_BFN, rtol=0, atol=1e-5)
        mask_BNF = torch.rand(spectrum_BNF.shape, requires_grad=needs_grad)
        power_BNF = transforms.power(spectrum_BNF)
        torch.testing.assert_close(power_BNF.mT, expected_BFN.abs().square(), rtol=1e-4, atol=1e-4)
        stem_BT = transforms.istft(transforms.masked(spectrum_BNF, mask_BNF), window, hop, length=6900)
        expected_BT = torch.istft(expected_BFN * mask_BNF.mT, size, hop, window=window, length=6900)
        torch.testing.assert_close(stem_BT, expected_BT, rtol=0, atol=1e-6 * size**0.5)
    if needs_grad:
        found, expected = (torch.autograd.grad(one.square().sum(), mask_BNF)[0] for one in (stem_BT, expected_BT))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_inverse_of_the_transform_is_the_signal():
    mix_BT, window = torch.randn(1, 5000, dtype=torch.float64), torch.hann_window(2048, dtype=torch.float64)
    spectrum_BNF = transforms.stft(torch.nn.functional.pad(mix_BT, (1024, 3072)), window, 320)
    torch.testing.assert_close(transforms.istft(spectrum_BNF, window, 320, length=5000), mix_BT, rtol=0, atol=1e-12)
