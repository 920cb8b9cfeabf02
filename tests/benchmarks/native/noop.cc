// The limit people name: an ext_proc in C++ on gRPC's callback API that decides nothing.
// It answers every message with CONTINUE, and echoes bodies that are streamed to it. It takes Envoy's
// access log, too.
//
// Usage: noop PORT
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <string>

#include "ext_proc.grpc.pb.h"

namespace v3 = envoy::service::ext_proc::v3;
using v3::ProcessingRequest;
using v3::ProcessingResponse;

class Stream final : public grpc::ServerBidiReactor<ProcessingRequest, ProcessingResponse> {
 public:
  Stream() { StartRead(&request_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::OK);
      return;
    }
    response_.Clear();
    Answer();
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);
    } else {
      Finish(grpc::Status::OK);
    }
  }

  void OnDone() override { delete this; }

 private:
  void Answer() {
    switch (request_.request_case()) {
      case ProcessingRequest::kRequestHeaders:
        response_.mutable_request_headers()->mutable_response();
        break;
      case ProcessingRequest::kResponseHeaders:
        response_.mutable_response_headers()->mutable_response();
        break;
      case ProcessingRequest::kRequestBody:
        Echo(request_.request_body(), response_.mutable_request_body());
        break;
      case ProcessingRequest::kResponseBody:
        Echo(request_.response_body(), response_.mutable_response_body());
        break;
      case ProcessingRequest::kRequestTrailers:
        response_.mutable_request_trailers();
        break;
      default:
        response_.mutable_response_trailers();
    }
  }

  static void Echo(const v3::HttpBody& body, v3::BodyResponse* response) {
    auto* echoed = response->mutable_response()->mutable_body_mutation()->mutable_streamed_response();
    echoed->set_body(body.body());
    echoed->set_end_of_stream(body.end_of_stream());
  }

  ProcessingRequest request_;
  ProcessingResponse response_;
};

class Processor final : public v3::ExternalProcessor::CallbackService {
  grpc::ServerBidiReactor<ProcessingRequest, ProcessingResponse>* Process(
      grpc::CallbackServerContext*) override {
    return new Stream;
  }
};

// Takes what Envoy's access log reports, and forgets it.
class Sink final : public grpc::CallbackGenericService {
  class Reader final : public grpc::ServerGenericBidiReactor {
   public:
    Reader() { StartRead(&report_); }
    void OnReadDone(bool ok) override { ok ? StartRead(&report_) : Finish(grpc::Status::OK); }
    void OnDone() override { delete this; }

   private:
    grpc::ByteBuffer report_;
  };

  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    return new Reader;
  }
};

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: noop PORT\n");
    return 2;
  }
  Processor processor;
  Sink sink;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:" + std::string(argv[1]), grpc::InsecureServerCredentials());
  builder.RegisterService(&processor);
  builder.RegisterCallbackGenericService(&sink);
  auto server = builder.BuildAndStart();
  if (!server) return 1;
  server->Wait();
}
