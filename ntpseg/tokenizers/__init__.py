"""Text and vision tokenizers, vocabulary, sequence format, token cache."""
