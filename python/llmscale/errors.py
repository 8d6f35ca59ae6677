"""Every exception that llmscale raises, as one tree.

LlmscaleError
  RequestError            the request is at fault; HTTP 400 unless said otherwise
    InvalidField          a field is missing, of the wrong type or outside its bound
    RequestTooLong        prompt and output exceed the longest sequence
    PromptTemplateError   the chat template refused the messages
      TemplateLimitReached  it wanted more steps, time or memory than it may have
    NothingToSample       its own bias, minimum or stop tokens left no token to draw
    UnknownModel          HTTP 404
    Unauthorized          HTTP 401
    PayloadTooLarge       HTTP 413
    MalformedRequest      bytes that are not HTTP/1.1, or that two parsers could read in two ways
    ForeignHost           HTTP 403: without a key only this machine may ask
    NotFound              HTTP 404: no such path
    MethodNotAllowed      HTTP 405
    ArrivalTimeout        HTTP 408: header or body did not arrive in time
    UnsupportedMediaType  HTTP 415
    HeaderTooLarge        HTTP 431
  Overloaded              a bounded queue is full; HTTP 429 with Retry-After
  Unavailable             no replica can take the request now; HTTP 503
  RequestFailed           the request was started and did not end well; HTTP 500
    RequestPoisoned       the worker died twice while computing it
    NotANumber            the model returned a logit that is not a number
    DeadlineExceeded      HTTP 504
    Cancelled             its client or an operator ended it
  ModelError              a model folder cannot be served as it is
    UnsupportedModel      architecture, rope or quantization that is not implemented
    InvalidCheckpoint     truncated, missing, surplus or mismatched tensors
    InvalidTokenizer      tokenizer or template do not fit the model
  ConfigError             a setting of the process is wrong
  TransportError          a peer speaks something else, or went away
    ClientTimeout         no answer within the time that the caller allowed
  WorkerError             the process that owns a device failed
    CudaError             the CUDA driver or compiler refused, or kernels are missing
      NoCudaDevice        there is no device, or no driver for it
    OutOfDeviceMemory     not even the smallest part of a step finds memory

Messages state the limit, the given value and what to do. `code` is the stable label in HTTP errors and metrics.
"""

from __future__ import annotations


class LlmscaleError(Exception):
    """Root of the tree."""

    code: str = "internal_error"
    http_status: int = 500


class RequestError(LlmscaleError):
    """The request is at fault. `field` names the parameter, if there is one."""

    code = "invalid_request"
    http_status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class InvalidField(RequestError):
    """A field is missing, of the wrong type or outside its bound."""

    code = "invalid_field"


class RequestTooLong(RequestError):
    """Prompt and output together exceed the longest sequence. Messages name its `setting`, which is the server's."""

    code = "request_too_long"
    setting = "max_sequence_tokens, the server's --max-model-len"

    @classmethod
    def beyond(cls, limit: int, given: str, advice: str, *, field: str | None = None) -> RequestTooLong:
        """The error of what does not fit into so many tokens.

        Clients tell it from others by the words that OpenAI's begins with, and shorten the conversation.
        """
        text = f"This model's maximum context length is {limit} tokens ({cls.setting}), {given}; {advice}"
        return cls(text, field=field)


class PromptTemplateError(RequestError):
    """The chat template refused the messages, or rendering broke a limit."""

    code = "prompt_template_error"


class TemplateLimitReached(PromptTemplateError):
    """The chat template wanted more steps, time or memory than it may have."""

    code = "template_limit_reached"


class NothingToSample(RequestError):
    """The request's own bias, minimum or stop tokens left no token to draw."""

    code = "nothing_to_sample"


class UnknownModel(RequestError):
    """The named model is not served here."""

    code = "unknown_model"
    http_status = 404


class Unauthorized(RequestError):
    """No API key, or one that is not known."""

    code = "unauthorized"
    http_status = 401


class PayloadTooLarge(RequestError):
    """The body exceeds its limit."""

    code = "payload_too_large"
    http_status = 413


class MalformedRequest(RequestError):
    """Bytes that are not an HTTP/1.1 request, or that two parsers could read in two ways."""

    code = "malformed_http"


class ForeignHost(RequestError):
    """A request without a key whose host or origin is not this machine."""

    code = "foreign_host"
    http_status = 403


class NotFound(RequestError):
    """No such path."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    """The path exists with another method. `allowed` are those that it takes, where they are known."""

    code = "method_not_allowed"
    http_status = 405

    def __init__(self, message: str, *, field: str | None = None, allowed: tuple[str, ...] = ()) -> None:
        super().__init__(message, field=field)
        self.allowed = allowed


class ArrivalTimeout(RequestError):
    """The header or the body of a request did not arrive in time."""

    code = "arrival_timeout"
    http_status = 408


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"
    http_status = 415


class HeaderTooLarge(RequestError):
    """The request line and the header fields together exceed their limit."""

    code = "header_too_large"
    http_status = 431


class Overloaded(LlmscaleError):
    """A bounded queue is full. `retry_after_seconds` is the predicted time until there is room."""

    code = "queue_full"
    http_status = 429

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(LlmscaleError):
    """No replica can take the request now."""

    code = "unavailable"
    http_status = 503


class RequestFailed(LlmscaleError):
    """The request was started and did not end well."""

    code = "request_failed"


class RequestPoisoned(RequestFailed):
    """The worker died twice while computing this request, so it is not tried again."""

    code = "request_poisoned"


class NotANumber(RequestFailed):
    """The model returned a logit that is not a number for this request."""

    code = "not_a_number"


class DeadlineExceeded(RequestFailed):
    """The request's deadline passed."""

    code = "deadline_exceeded"
    http_status = 504


class Cancelled(RequestFailed):
    """The client or an operator ended the request."""

    code = "cancelled"


class ModelError(LlmscaleError):
    """A model folder cannot be served as it is."""

    code = "model_error"


class UnsupportedModel(ModelError):
    """An architecture, rope scaling or quantization that is not implemented."""

    code = "unsupported_model"


class InvalidCheckpoint(ModelError):
    """Truncated, missing, surplus or mismatched tensors."""

    code = "invalid_checkpoint"


class InvalidTokenizer(ModelError):
    """Tokenizer, vocabulary or template do not fit the model."""

    code = "invalid_tokenizer"


class ConfigError(LlmscaleError):
    """A setting of the process is wrong."""

    code = "config_error"


class TransportError(LlmscaleError):
    """A peer speaks something else, or went away."""

    code = "transport_error"


class ClientTimeout(TransportError):
    """No answer within the time that the caller allowed."""

    code = "client_timeout"


class WorkerError(LlmscaleError):
    """The process that owns a device failed."""

    code = "worker_error"


class CudaError(WorkerError):
    """The CUDA driver or compiler refused a call, or the kernels are not installed."""

    code = "cuda_error"


class NoCudaDevice(CudaError):
    """There is no CUDA device, or no driver for it."""

    code = "no_cuda_device"


class OutOfDeviceMemory(WorkerError):
    """Not even the smallest part of a step finds memory on the device."""

    code = "out_of_device_memory"
