"""From a log-mel spectrogram back to sound.

The log-mel keeps neither phases nor all of the spectrum. The power spectrum is the nonnegative one whose mel bands fit best, by the
multiplicative updates for the Itakura-Saito divergence (Fevotte and Idier, 2011, with their exponent 1/2, under which the fit can't get
worse): it counts errors by their ratio, as a log-mel does. The phases are those of Griffin and Lim (1984) with the momentum of Perraudin,
Balazs and Sondergaard (2013).
"""

import math

import torch
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, mel_filters

FIT_STEPS = 200
GRIFFIN_LIM_STEPS = 200
MOMENTUM = 0.99
"""As in the paper."""
LEAST_POWER = 1e-10
"""Whisper's own floor of mel power."""


def mel_power(log_mel: Tensor) -> Tensor:
    """Undoes the last steps of Whisper's front end, (log10(power) + 4) / 4."""
    return 10 ** (log_mel * 4 - 4)


def fit_power(mel: Tensor) -> Tensor:
    """Mel power [n_mels, frames] -> power spectrum [n_fft / 2 + 1, frames]. What no band covers is zero."""
    filters = mel_filters(mel.device, mel.shape[0])
    filters, mel = filters.double(), mel.double().clamp(min=LEAST_POWER)
    covered = filters.sum(0) > 0
    power = (filters.T @ mel) / filters.square().sum(0).clamp(min=LEAST_POWER)[:, None]
    for _ in range(FIT_STEPS):
        fitted = (filters @ power).clamp(min=LEAST_POWER)
        wanted, had = filters.T @ (mel / fitted.square()), filters.T @ (1 / fitted)
        power = power * (wanted / had.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return (power * covered[:, None]).float()


def griffin_lim(magnitude: Tensor, generator: torch.Generator) -> Tensor:
    """Samples [frames * 160] whose spectrogram, as Whisper makes it, has about this magnitude [n_fft / 2 + 1, frames].

    generator: of the phases to begin with.
    """
    n_samples = magnitude.shape[1] * HOP_LENGTH
    magnitude = torch.cat([magnitude, magnitude[:, -1:]], dim=1)  # Whisper drops the last of a centred transform
    window = torch.hann_window(N_FFT)

    def samples_of(spectrum: Tensor) -> Tensor:
        return torch.istft(spectrum, N_FFT, HOP_LENGTH, window=window, length=n_samples)

    angle = 2 * math.pi * torch.rand(magnitude.shape, generator=generator)
    spectrum, before = torch.polar(magnitude, angle), torch.zeros(magnitude.shape, dtype=torch.complex64)
    for _ in range(GRIFFIN_LIM_STEPS):
        consistent = torch.stft(samples_of(spectrum), N_FFT, HOP_LENGTH, window=window, return_complex=True)
        ahead = consistent + MOMENTUM * (consistent - before)
        spectrum, before = torch.polar(magnitude, ahead.angle()), consistent
    return samples_of(spectrum)


def sound_of(log_mel: Tensor, seed: int = 0) -> Tensor:
    """float32 samples [frames * 160] at 16 kHz whose log-mel is about the given one, [n_mels, frames] in Whisper's scale.

    Deterministic by seed.
    """
    generator = torch.Generator().manual_seed(seed)
    return griffin_lim(fit_power(mel_power(log_mel.cpu())).sqrt(), generator)
