"""Hugging Face classes of the vision-language-action model; `register_auto_classes` makes transformers know them."""

from __future__ import annotations


def register_auto_classes() -> None:
    """Let AutoConfig, AutoModelForImageTextToText, AutoProcessor and AutoImageProcessor load our folders.

    Also AutoModelForVision2Seq, the name in published configuration files, where transformers still has it. A
    registered class is preferred over the code that an `auto_map` names, so `trust_remote_code` is neither needed nor
    asked for (given all the same, transformers 4 would run the folder's code). Repeated calls change nothing.
    """
    # Imported here: the package must stay cheap to import.
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, PrismaticForConditionalGeneration
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor

    # transformers 5 dropped the second one.
    model_classes = [AutoModelForImageTextToText, getattr(transformers, "AutoModelForVision2Seq", None)]
    for config, model in (
        (PrismaticConfig, PrismaticForConditionalGeneration),
        (OpenVLAConfig, OpenVLAForActionPrediction),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class in filter(None, model_classes):
            auto_class.register(config, model, exist_ok=True)
        AutoProcessor.register(config, PrismaticProcessor, exist_ok=True)
        AutoImageProcessor.register(config, slow_image_processor_class=PrismaticImageProcessor, exist_ok=True)
