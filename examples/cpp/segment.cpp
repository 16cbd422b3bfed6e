// Runs the ONNX file of a segmenter, as `sievit export` writes it, on a picture with OpenVINO.
//
//   segment model.onnx picture.ppm labels.pgm
//
// The picture is a binary PPM (`convert picture.jpg picture.ppm`). The labels are a PGM of the size at which the network
// sees the picture, one byte per pixel: the number of the class. How pictures are prepared is read from the file.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/runtime/core.hpp>

struct Picture {
    size_t height = 0, width = 0;
    std::vector<float> pixels;  // (height, width, 3) in 0..1
};

Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    size_t width = 0, height = 0, most = 0;
    file >> magic >> width >> height >> most;
    file.get();
    if (!file || magic != "P6" || most != 255) throw std::runtime_error(path + ": not a binary PPM of 8 bits");
    std::vector<uint8_t> bytes(width * height * 3);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), bytes.size())) throw std::runtime_error(path + ": cut off");
    Picture picture{height, width, std::vector<float>(bytes.size())};
    std::transform(bytes.begin(), bytes.end(), picture.pixels.begin(), [](uint8_t b) { return b / 255.0f; });
    return picture;
}

Picture resized(const Picture& from, size_t height, size_t width) {  // bilinear, between the centres of pixels
    if (from.height == height && from.width == width) return from;
    Picture to{height, width, std::vector<float>(height * width * 3)};
    auto place = [](size_t i, size_t now, size_t before) {
        return std::clamp((i + 0.5f) * before / now - 0.5f, 0.0f, float(before - 1));
    };
    for (size_t y = 0; y < height; ++y)
        for (size_t x = 0; x < width; ++x) {
            float v = place(y, height, from.height), u = place(x, width, from.width);
            size_t y0 = v, x0 = u, y1 = std::min(y0 + 1, from.height - 1), x1 = std::min(x0 + 1, from.width - 1);
            for (size_t c = 0; c < 3; ++c) {
                auto at = [&](size_t j, size_t i) { return from.pixels[(j * from.width + i) * 3 + c]; };
                float above = at(y0, x0) + (u - x0) * (at(y0, x1) - at(y0, x0));
                float below = at(y1, x0) + (u - x0) * (at(y1, x1) - at(y1, x0));
                to.pixels[(y * width + x) * 3 + c] = above + (v - y0) * (below - above);
            }
        }
    return to;
}

// The numbers behind `"name":` in JSON; empty for null.
std::vector<double> numbers(const std::string& json, const std::string& name) {
    size_t at = json.find("\"" + name + "\":");
    if (at == std::string::npos) throw std::runtime_error("the file's metadata has no " + name);
    const char* text = json.c_str() + at + name.size() + 3;
    std::vector<double> found;
    for (char* end; *(text += std::strspn(text, " [,"));  text = end) {
        double value = std::strtod(text, &end);
        if (end == text) break;
        found.push_back(value);
        if (*end != ',' || json[at + name.size() + 4] != '[') break;
    }
    return found;
}

int main(int argc, char** argv) try {
    if (argc != 4) throw std::runtime_error("usage: segment model.onnx picture.ppm labels.pgm");
    ov::Core core;
    auto model = core.read_model(argv[1]);
    const auto known = model->get_rt_info<std::string>("framework", "sievit");
    const auto mean = numbers(known, "mean"), deviation = numbers(known, "std"), least = numbers(known, "min_size");
    const size_t stride = numbers(known, "patch_size").at(0);
    Picture picture = read_ppm(argv[2]);
    if (!least.empty()) {
        double scale = std::min(least[0] / std::min(picture.height, picture.width),
                                numbers(known, "max_size").at(0) / std::max(picture.height, picture.width));
        picture = resized(picture, picture.height * scale + 0.5, picture.width * scale + 0.5);
    }
    const size_t height = picture.height, width = picture.width;
    const size_t rows = (height + stride - 1) / stride * stride, columns = (width + stride - 1) / stride * stride;
    ov::Tensor images(ov::element::f32, {1, 3, rows, columns});
    std::fill_n(images.data<float>(), images.get_size(), 0.0f);
    for (size_t c = 0; c < 3; ++c)
        for (size_t y = 0; y < height; ++y)
            for (size_t x = 0; x < width; ++x)
                images.data<float>()[(c * rows + y) * columns + x] =
                    (picture.pixels[(y * width + x) * 3 + c] - mean.at(c)) / deviation.at(c);
    auto request = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32)).create_infer_request();
    request.set_tensor("images", images);
    request.infer();
    const ov::Tensor scores = request.get_tensor("scores"), keep = request.get_tensor("keep");
    const size_t classes = scores.get_shape()[1], plane = rows * columns;
    std::ofstream out(argv[3], std::ios::binary);
    out << "P5\n" << width << ' ' << height << "\n255\n";
    for (size_t y = 0; y < height; ++y)
        for (size_t x = 0; x < width; ++x) {
            const float* score = scores.data<float>() + y * columns + x;
            size_t best = 0;
            for (size_t k = 1; k < classes; ++k)
                if (score[k * plane] > score[best * plane]) best = k;
            out.put(char(best));
        }
    const auto computed = std::count(keep.data<bool>(), keep.data<bool>() + keep.get_size(), true);
    std::cout << argv[3] << ": " << width << " x " << height << " pixels, " << 100.0 * computed / keep.get_size()
              << " % of the tokens computed\n";
    return out.flush() ? 0 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
