"""The contract between the stages: records, their codec, shards on disk, their order."""
