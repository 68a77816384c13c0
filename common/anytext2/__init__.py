"""AnyText2's network and nothing else: UNet with AttnX, WriteNet, VAE, checkpoint keys."""
