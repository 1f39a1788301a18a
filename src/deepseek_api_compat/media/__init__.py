"""Pictures and sound, for models that read only text: fetched safely, looked at, and read out."""
