"""Whether the parts of a model belong together: one Stable Diffusion 1.x or XL model for text to image."""

from __future__ import annotations

from apl_core.errors import ModelError
from apl_train.model.base_model import SUPPORTED
from apl_train.model.files import Parts
from apl_train.model.pipelines import TIMESTEPS


def check_parts(parts: Parts) -> None:
    """Raises ModelError unless these are the parts of one model that can be learned on."""
    unet, vae, schedule = parts.unet.config, parts.vae.config, parts.schedule
    width = parts.text_encoder.config.hidden_size
    problems = [
        (width == 1024, "text_encoder", "The text encoder is 1024 wide, as those of Stable Diffusion 2.x are."),
        (unet.in_channels != vae.latent_channels, "unet",
         f"The UNet takes {unet.in_channels} channels, the VAE makes {vae.latent_channels}: not a plain "
         "text-to-image model."),
        (schedule.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"), "scheduler",
         f"The model predicts {schedule.get('prediction_type')}, neither noise nor velocity."),
        (schedule.get("num_train_timesteps", TIMESTEPS) != TIMESTEPS, "scheduler",
         f"The noise schedule has {schedule.get('num_train_timesteps')} timesteps, not {TIMESTEPS}."),
        (unet.get("time_cond_proj_dim") is not None, "unet",
         "The UNet takes guidance as an input, as models distilled to few steps (LCM) do."),
        (parts.text_encoder_2 is None and unet.get("addition_embed_type") is not None, "unet",
         "The UNet takes more than one text encoder gives."),
        *(_problems_xl(parts) if parts.text_encoder_2 is not None else
          [(unet.cross_attention_dim != width, "unet",
            f"The UNet attends to states {unet.cross_attention_dim} wide; the text encoder is {width} wide.")]),
    ]
    for wrong, field, message in problems:
        if wrong:
            raise ModelError(message, SUPPORTED, field=field)


def _problems_xl(parts: Parts) -> list[tuple[bool, str, str]]:
    unet, first, second = parts.unet.config, parts.text_encoder.config, parts.text_encoder_2.config
    both = first.hidden_size + second.hidden_size
    embedded = second.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    return [
        (unet.addition_embed_type != "text_time", "unet",
         f"The UNet is conditioned on {unet.addition_embed_type}, not on pooled text and sizes."),
        (unet.cross_attention_dim != both, "unet",
         f"The UNet attends to states {unet.cross_attention_dim} wide; the text encoders are {first.hidden_size} and "
         f"{second.hidden_size} wide."),
        (unet.projection_class_embeddings_input_dim != embedded, "unet",
         f"The UNet takes {unet.projection_class_embeddings_input_dim} numbers of pooled text and sizes; the second "
         f"text encoder and six sizes make {embedded}."),
    ]
