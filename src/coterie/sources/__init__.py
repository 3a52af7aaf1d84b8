"""Where experts are read from: checkpoints and adapters, lazily, tensor by tensor, under one set of names."""
