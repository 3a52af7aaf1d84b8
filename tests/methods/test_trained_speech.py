"""Models that make frames of raw samples: a mask of samples is one of frames to their routers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from trained import randomise

import coterie

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
    conv_stride=[4, 2], conv_kernel=[8, 3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True, classifier_proj_size=8, num_labels=3, num_feat_extract_layers=2, mask_time_prob=0.0,
    mask_feature_prob=0.0, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
MODELS = {
    "wav2vec2": (tf.Wav2Vec2Config, tf.Wav2Vec2ForSequenceClassification, {}),
    "sew": (tf.SEWConfig, tf.SEWForSequenceClassification, {"squeeze_factor": 2}),
    "hubert": (tf.HubertConfig, tf.HubertForSequenceClassification, {}),
}


@pytest.mark.parametrize("method", ["smear", "hash", "soft_moe"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_has_no_say(name: str, method: str) -> None:
    config, kind, more = MODELS[name]
    torch.manual_seed(0)
    dense = kind(config(**SMALL, **more)).eval()
    how = coterie.MixtureConfig(
        method=method, experts=2, parameters={"rank": 2}, modules={"include": ["*encoder.layers.*"]}
    )
    mixture = coterie.wrap(dense, how)
    randomise(mixture)
    mixture.eval()
    long, short = torch.randn(1, 400), torch.randn(1, 280)
    both = torch.zeros(2, 400)
    both[0], both[1, :280] = long, short
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 280:] = 0
    with torch.no_grad():
        padded = mixture(input_values=both, attention_mask=mask).logits
        alone = mixture(input_values=short, attention_mask=torch.ones_like(short).long()).logits
        added = (alone[0] - dense(input_values=short).logits[0]).abs().max()
        assert added > 0 and (padded[1] - alone[0]).abs().max() < 1e-3 * added
