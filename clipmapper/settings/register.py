"""The schema, made known to Hydra under the names in the defaults lists of ``conf/``."""

from collections.abc import Mapping

from hydra.core.config_store import ConfigStore

from clipmapper.settings import commands, data, schema

SCHEMAS = {
    "train_schema": schema.TrainConfig,
    "explain_schema": commands.ExplainConfig,
    "perturb_schema": commands.PerturbConfig,
    "pretrain_clip_schema": commands.PretrainConfig,
    "scenes_vqa_schema": data.ScenesVQAConfig,
    "scenes_captions_schema": data.ScenesCaptionsConfig,
    "coco_captions_schema": data.CocoCaptionsConfig,
    "manifest_schema": data.ManifestConfig,
    "huggingface_schema": data.HuggingFaceConfig,
    "shards_schema": data.ShardsConfig,
    "vqa_v2_schema": data.VQAv2Config,
    "flickr_captions_schema": data.FlickrCaptionsConfig,
    "wandb_logger_schema": schema.WandbLoggerConfig,
    "csv_logger_schema": schema.CSVLoggerConfig,
    "tensorboard_logger_schema": schema.TensorBoardLoggerConfig,
    "mlflow_logger_schema": schema.MLflowLoggerConfig,
    "other_logger_schema": schema.OtherLoggerConfig,
    "no_callbacks_schema": schema.CallbacksConfig,
    "relevance_callback_schema": schema.RelevanceCallbackConfig,
}


def register(schemas: Mapping[str, type] = SCHEMAS) -> None:
    """Store dataclasses of settings by their names."""
    store = ConfigStore.instance()
    for name, schema_of in schemas.items():
        store.store(name=name, node=schema_of)
