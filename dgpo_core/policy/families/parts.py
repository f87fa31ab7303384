"""Tensors by which single checkpoints of several families show that a component is in them."""

VAE = ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight")
CLIP_L = "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight"
CLIP_G = "text_encoders.clip_g.transformer.text_model.embeddings.position_embedding.weight"
T5 = "text_encoders.t5xxl.transformer.shared.weight"
