/* Entry as the Multiboot specification says (32-bit protected mode, EBX = information), the way of an AP to C, and
 * hypercalls. The 64-bit build runs in long mode; the 32-bit build without paging, which KVM without hardware
 * virtualisation (kvm_pvm) does not have in protected mode.
 */
#include "../bare/entry.h"

#define MAX_VPS 64

    .section .text.entry, "ax"
    .code32
    .balign 4
    .long 0x1badb002, 0, -0x1badb002
    .globl kit_entry
kit_entry:
    cli
    cld
    mov %ebx, multiboot_information
    lgdt gdt_pointer
    ljmp $CODE32, $protected_mode

/* Every VP passes here; its number is its initial APIC id. */
    .globl protected_mode
protected_mode:
    enter_mode
#ifdef __x86_64__
    ljmp $CODE64, $full_mode
    .code64
#endif
    .globl full_mode
full_mode:
    mov $1, %eax
    cpuid
    shr $24, %ebx
    cmp $MAX_VPS, %ebx
    jae 1f
    mov %ebx, %esp
    inc %esp
    imul $STACK_SIZE, %esp, %esp
    add $vp_stacks, %esp
    cld
    test %ebx, %ebx
    jnz 2f
    call kit_main
1:  cli
    hlt
    jmp 1b
2:  call vp_main
    jmp 1b

#ifndef __x86_64__
    .macro call_page
    push %ebp
    push %ebx
    push %esi
    push %edi
    mov 20(%esp), %eax
    mov 24(%esp), %edx
    mov 28(%esp), %ecx
    mov 32(%esp), %ebx
    mov 36(%esp), %esi
    mov 40(%esp), %edi
    mov $hypercall_page, %ebp
    call *%ebp
    .endm
    .macro return_from_page
    pop %edi
    pop %esi
    pop %ebx
    pop %ebp
    ret
    .endm
#endif

/* u64 hypercall(u64 control, u64 input, u64 output): the calling convention of the build's mode. */
    .text
    .globl hypercall
hypercall:
#ifdef __x86_64__
    mov %rdi, %rcx
    mov %rdx, %r8
    mov %rsi, %rdx
    mov $hypercall_page, %eax
    jmp *%rax
#else
    call_page
    return_from_page
#endif

/* u32 hypercall_changes(u64 control, u64 input, u64 output): the same, with every register filled that the convention
 * leaves alone. Returns how many of them, and of the input's, are not as before.
 */
    .globl hypercall_changes
hypercall_changes:
#ifdef __x86_64__
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rdi, %rcx
    mov %rdx, %r8
    mov %rsi, %rdx
    mov $0x11111111, %ebx
    mov $0x22222222, %ebp
    mov $0x33333333, %esi
    mov $0x44444444, %edi
    mov $0x55555555, %r9d
    mov $0x66666666, %r10d
    mov $0x77777777, %r12d
    mov $0x12345678, %r13d
    mov $0x23456789, %r14d
    mov $0x3456789a, %r15d
    push %rcx
    push %rdx
    push %r8
    mov $hypercall_page, %eax
    call *%rax
    xor %eax, %eax
    .macro count register, value
    cmp \value, \register
    setne %r11b
    movzbl %r11b, %r11d
    add %r11d, %eax
    .endm
    count %r8, (%rsp)
    count %rdx, 8(%rsp)
    count %rcx, 16(%rsp)
    add $24, %rsp
    count %rbx, $0x11111111
    count %rbp, $0x22222222
    count %rsi, $0x33333333
    count %rdi, $0x44444444
    count %r9, $0x55555555
    count %r10, $0x66666666
    count %r12, $0x77777777
    count %r13, $0x12345678
    count %r14, $0x23456789
    count %r15, $0x3456789a
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
#else
    call_page
    xor %eax, %eax
    .macro count register, value
    cmp \value, \register
    setne %dl
    movzbl %dl, %edx
    add %edx, %eax
    .endm
    count %ecx, 28(%esp)
    count %ebx, 32(%esp)
    count %esi, 36(%esp)
    count %edi, 40(%esp)
    count %ebp, $hypercall_page
    return_from_page
#endif

/* An AP starts here, in a page that vp.c copied this to. */
    ap_trampoline protected_mode

    .data
    .balign 16
    .globl gdt, multiboot_information
gdt:
    flat_descriptors
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
multiboot_information:
    .long 0

#ifdef __x86_64__
    .globl page_root, page_directory
    identity_map 3
#endif

    .bss
    .globl vp_stacks, hypercall_page
    .balign STACK_SIZE
vp_stacks:
    .skip MAX_VPS * STACK_SIZE
hypercall_page:
    .skip PAGE_SIZE

    .section .note.GNU-stack, "", @progbits
