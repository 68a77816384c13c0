"""The network of AnyText2 and nothing else: UNet with AttnX, WriteNet, VAE, checkpoint keys."""
