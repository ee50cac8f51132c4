"""What AUTOMATIC1111's web UI, and the programs that do as it does, call things: LoRAs in prompts, samplers, parameters."""
